"""`python -m gemma_mtp`: the command line."""

from gemma_mtp.cli import run

if __name__ == "__main__":
    run()
