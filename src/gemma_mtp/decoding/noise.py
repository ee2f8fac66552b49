"""Counter-based random numbers: a pure function of (seed, stream, position, token id).

No generator state, so a number depends neither on how many rows share a call, nor on their order, nor on the device:
it is an integer hash (the finaliser of splitmix64, Steele, Lea and Flood 2014) in wrapping 64-bit arithmetic.
Drafter and target therefore see the same noise for the same token at the same position, without talking to each other.

Shapes: `...` any leading dimensions (usually R rows), C candidates.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

#: What a number is used for; numbers of two streams are independent.
STREAM_CHOICE = 0  # the target's choice of a token, and the drafter's guess at it
STREAM_DRAFT = 1  # drafts drawn for `rejection` and `block` verification
STREAM_ACCEPT = 2  # their acceptance tests
STREAM_RESIDUAL = 3  # the token drawn after the last accepted draft

#: Upper bound of the draft tokens in one round, see `round_counters`.
MAX_DRAFT_TOKENS = 255

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def signed(word: int) -> int:
    """The 64-bit word as the int64 with the same bits."""
    return word - (1 << 64) if word >> 63 else word


def _mix_word(word: int) -> int:
    """splitmix64's finaliser of one host integer."""
    word &= _WORD
    word = ((word ^ (word >> 30)) * _MULTIPLIER_1) & _WORD
    word = ((word ^ (word >> 27)) * _MULTIPLIER_2) & _WORD
    return word ^ (word >> 31)


def _xor_shift_(words: Tensor, shift: int) -> Tensor:
    # int64 shifts are arithmetic: the mask clears the copies of the sign bit
    return words.bitwise_xor_((words >> shift).bitwise_and_((1 << (64 - shift)) - 1))


def _mix_(words: Tensor) -> Tensor:
    """splitmix64's finaliser of each int64 element, in place. Equal to `_mix_word` bit for bit."""
    _xor_shift_(words, 30).mul_(signed(_MULTIPLIER_1))
    _xor_shift_(words, 27).mul_(signed(_MULTIPLIER_2))
    return _xor_shift_(words, 31)


def uniform(seed: int, positions: Tensor, token_ids: Tensor, stream: int) -> Tensor:
    """Uniform numbers in the open interval (0, 1): float64 [..., C], with 52 random bits, equal on every device.

    `positions` int64 [...]; `token_ids` int64 [C] or [..., C].
    """
    return _uniform_of_keys(row_keys(signed(stream_key(seed, stream)), positions), token_ids)


def _uniform_of_keys(row_keys: Tensor, token_ids: Tensor) -> Tensor:
    words = _mix_(row_keys.unsqueeze(-1) + (token_ids + 1) * signed(_GOLDEN))
    bits = (words >> 12).bitwise_and_((1 << 52) - 1)
    return bits.mul_(2).add_(1).to(torch.float64).mul_(2.0**-53)  # odd numbers below 2**53: exact, never 0 or 1


def row_key(seed: int, position: int, stream: int) -> int:
    """The 64-bit word that `uniform` mixes a row's numbers from, with the token id; `src/native/best.cpp` does too."""
    return _mix_word(position * _GOLDEN + stream_key(seed, stream))


def row_keys(stream_keys: Tensor | int, positions: Tensor) -> Tensor:
    """`row_key`s where the positions are: int64 [...]. `stream_keys`: of their streams, int64 or one `signed` word."""
    return _mix_(positions * signed(_GOLDEN) + stream_keys)


@functools.lru_cache(maxsize=4096)
def stream_key(seed: int, stream: int) -> int:
    """The 64-bit word that all `row_key`s of a stream are made of, each with its position."""
    return _mix_word(_mix_word(seed) + (stream + 1) * _GOLDEN)


def gumbel(seed: int, positions: Tensor, token_ids: Tensor, stream: int) -> Tensor:
    """Standard Gumbel noise, float32 [..., C]; arguments as in `uniform`.

    The logarithms are taken in float64: a winner's uniform lies near 1, where float32 is coarse.
    """
    return _gumbel_of(uniform(seed, positions, token_ids, stream))


def keyed_gumbel(keys: Sequence[int] | Tensor, token_ids: Tensor) -> Tensor:
    """The same from `row_key`s, one a row, int64 where they are a tensor: float32 [R, C]."""
    if not isinstance(keys, Tensor):
        keys = torch.tensor([signed(key) for key in keys], device=token_ids.device)
    return _gumbel_of(_uniform_of_keys(keys, token_ids))


def _gumbel_of(uniform_RC: Tensor) -> Tensor:
    return uniform_RC.log_().neg_().log_().neg_().to(torch.float32)


def round_counters(first_position: Tensor, count: int) -> Tensor:
    """Noise positions of one `rejection` or `block` round: int64 [..., count], for slots 0 .. count-1.

    `first_position` int64 [...]: position of the round's first draft. A discarded draft's position comes up again in
    the next round, and `block` has by then looked at the noise used there; numbers keyed by position alone would be
    used twice and bias the output. No two rounds start at the same position, so these counters never repeat.
    """
    slots = torch.arange(count, device=first_position.device)
    return first_position.unsqueeze(-1) * (MAX_DRAFT_TOKENS + 1) + slots
