"""What tensor cores compute, in NumPy: the published model of them (MMA-Sim, arXiv:2511.10909).

An element follows from its row of A, its column of B and the accumulator: products are exact; they and the accumulator
are aligned to the largest exponent, cut to a number of fractional bits, summed, and rounded towards zero. Hopper and
Blackwell take 16 products at once with 25 bits, Ampere and Ada 8 with 24.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]


class Core(NamedTuple):
    """`depth` products at once, cut to `bits` fractional bits."""

    depth: int
    bits: int


HOPPER, ADA = Core(16, 25), Core(8, 24)


def wide(bits: NDArray[np.uint16]) -> Floats:
    """float32 of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: Floats) -> NDArray[np.uint16]:
    """bf16 bits of float32, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


#: the exponent of zero, which is aligned to nothing
NONE = -(10**6)


def exponents_of(values: Floats) -> NDArray[np.int32]:
    return np.where(values == 0, NONE, np.frexp(values)[1] - 1).astype(np.int32)


def step(a_MK: Floats, b_KN: Floats, acc_MN: Floats, bits: int) -> Floats:
    """One instruction: the accumulator and `a` times `b`, float32 [M, N]. Operands hold bf16 values in float64."""
    acc = acc_MN.astype(np.float64)
    # a product's exponent is the sum of its factors', one less than that of its value at times
    products = (exponents_of(a_MK)[:, :, None] + exponents_of(b_KN)[None]).max(1)
    largest = np.maximum(products, exponents_of(acc))
    unit = np.where(largest > NONE // 2, largest, 0) - bits
    scale = np.ldexp(1.0, -unit)  # a power of two, of which no factor leaves float64's range: exact
    terms = a_MK[:, :, None] * b_KN[None]
    terms *= scale[:, None, :]
    total = np.trunc(terms, out=terms).sum(1) + np.trunc(acc * scale)  # integers below 2**31: exact
    return toward_zero(total * np.ldexp(1.0, unit))


def toward_zero(values: Floats) -> Floats:
    """float32 of float64, cut."""
    nearest = values.astype(np.float32)
    over = np.abs(nearest.astype(np.float64)) > np.abs(values)
    return np.where(over, np.nextafter(nearest, np.float32(0)), nearest)


def product(a_MK: Floats, b_KN: Floats, acc_MN: Floats, core: Core) -> Floats:
    """A chain of instructions, ascending. Rows and columns of zeros leave the accumulator as it is."""
    rows, columns = (a_MK != 0).any(1), (b_KN != 0).any(0)
    some = np.ix_(rows, columns)
    a_MK, b_KN, acc = a_MK[rows], b_KN[:, columns], acc_MN[some]
    for k in range(0, a_MK.shape[1], core.depth):
        acc = step(a_MK[:, k : k + core.depth], b_KN[k : k + core.depth], acc, core.bits)
    out = acc_MN.copy()
    out[some] = acc
    return out


CORES = {"Hopper": HOPPER, "Ada": ADA}
