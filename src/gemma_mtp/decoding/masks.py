"""Masks of a vocabulary with one bit a token, lowest bit first: uint8 [B], B = ceil(V / 8)."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint8]


def mask_bytes(vocab_size: int) -> int:
    return (vocab_size + 7) // 8


@functools.cache
def everything(vocab_size: int) -> Bits:
    """Returns the mask of every token, which is one object for each size, and is not to be written."""
    bits = np.full(mask_bytes(vocab_size), 0xFF, dtype=np.uint8)
    bits[-1] &= 0xFF >> (-vocab_size % 8)
    bits.flags.writeable = False
    return bits


def only(token_ids: Iterable[int], vocab_size: int) -> Bits:
    """Returns the mask of these tokens, of which those that the vocabulary does not have are left out."""
    bits = np.zeros(mask_bytes(vocab_size), dtype=np.uint8)
    for token_id in token_ids:
        if 0 <= token_id < vocab_size:
            put(bits, token_id, True)
    return bits


def without(bits: Bits, token_ids: Iterable[int]) -> Bits:
    """Returns a mask less these tokens."""
    bits = bits.copy()
    for token_id in token_ids:
        put(bits, token_id, False)
    return bits


def put(bits: Bits, token_id: int, value: bool) -> None:
    bit = np.uint8(1 << (token_id & 7))
    bits[token_id >> 3] = bits[token_id >> 3] | bit if value else bits[token_id >> 3] & ~bit


def allows(bits: Bits, token_id: int) -> bool:
    return bool(bits[token_id >> 3] >> (token_id & 7) & 1)
