"""The command line: `gemma-mtp`, and `python -m gemma_mtp`."""

import signal
import sys

from gemma_mtp.interrupts import leave


def run() -> None:
    """Run the command line and exit.

    Ctrl-C ends it with 130 at any moment: at once while modules are imported and while Python ends, where there is
    nothing to undo; through KeyboardInterrupt while a command runs.
    """
    signal.signal(signal.SIGINT, leave)
    from gemma_mtp.cli import main

    code = main()
    signal.signal(signal.SIGINT, leave)
    sys.exit(code)


if __name__ == "__main__":
    run()
