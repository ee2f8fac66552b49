"""Bytes and numbers as people write and read them."""

from __future__ import annotations

import re

from gemma_mtp.errors import GemmaMtpError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
#: what bytes are shown in, the largest first
SHOWN = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


def parse_bytes(text: str, option: str) -> int:
    """The bytes that `24GB` (10**9 each), `24GiB` (2**30 each) or a number mean. Raises GemmaMtpError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise GemmaMtpError(f"{option} is {text!r}, but must be a number of bytes above 0, such as 24GB or 24GiB.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def shown_bytes(count: float) -> str:
    """Returns bytes for people, in powers of ten as memory is sold."""
    unit, size = _unit(count)
    digits = 0 if size == 1 or abs(count) >= 100 * size else 1 if abs(count) >= 10 * size else 2
    return f"{count / size:.{digits}f} {unit}"


def shown_bytes_of(done: float, of: float) -> str:
    """Returns how many of so many bytes, both in the unit of the whole."""
    unit, size = _unit(of)
    digits = 0 if size == 1 else 1
    return f"{done / size:.{digits}f} of {of / size:.{digits}f} {unit}"


def three_digits(value: float) -> str:
    """Returns a number for people, rounded to three digits and without a power of ten: 0.168, 23, 5940."""
    return f"{float(f'{value:.3g}'):.15g}"


def counted(count: int, noun: str) -> str:
    """Returns a number of things: 1 token, 2 tokens."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _unit(count: float) -> tuple[str, float]:
    return next((entry for entry in SHOWN if abs(count) >= entry[1]), SHOWN[-1])
