"""Write src/gemma_mtp/_native.pyi, the types of the native module, from the built module.

python tools/native_stub.py           # write it (`make stub`)
python tools/native_stub.py --check   # say whether it is what the module gives (`make check`)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nanobind.stubgen import StubGen  # type: ignore[import-untyped]

from gemma_mtp.backend.native import native_available

#: Python sees an address as a number. These types say what lies there; `src/native/address.h` names them.
ADDRESSES = ("Floats", "Int64s", "Int32s", "Bytes")
HEADER = """# Written by `make stub` from the built module; do not edit.
from typing import NewType

# addresses, by what lies there; 0 for none
"""
STUB = Path(__file__).parents[1] / "src" / "gemma_mtp" / "_native.pyi"


def stub() -> str:
    """Returns the text of the stub that belongs to the built module."""
    from gemma_mtp import _native

    generator = StubGen(_native)
    generator.put(_native)
    addresses = "".join(f'{name} = NewType("{name}", int)\n' for name in ADDRESSES)
    return f"{HEADER}{addresses}\n{generator.get()}"


def main() -> None:
    if not native_available():
        sys.exit(f"the native module is not built, so {STUB.name} can not be made or checked.")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        STUB.write_text(stub(), encoding="utf-8")
    elif STUB.read_text(encoding="utf-8") != stub():
        sys.exit(f"{STUB} is not what the built module gives; run `make stub`.")


if __name__ == "__main__":
    main()
