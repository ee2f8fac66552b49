"""Choices after top-k, top-p and min-p: what `decoding.sampling` keeps and chooses, without an order of candidates.

A candidate's key is an integer: its logit's bits in an order that compares as the floats do, and below them its id, the
lower the larger. Keys are distinct, so what top-k keeps, and what top-p keeps, are the candidates from a key on: top-k
the largest key that k candidates reach, top-p the largest from which on they have a mass of top_p. Both are found digit
by digit, from counts and from masses of candidates at and above each of sixteen digits. Masses are fixed-point
integers, as on the CPU, so that no sum has an order (rule R6). A row is cut into slices, which are counted beside each
other; each launch reads what the one before it counted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_mtp.backend.cuda.draws import Draws, noisy
from gemma_mtp.backend.cuda.launch import Launch, power_of_two

#: candidates of a program, and those that it counts at once
SLICE, READ = 4096, 512
#: bits of an id in a key, and of a key; kernels have these numbers as they are
ID_BITS, KEY_BITS, DIGIT_BITS = 24, 56, 4
DIGITS, PASSES = 1 << DIGIT_BITS, KEY_BITS // DIGIT_BITS


@triton.jit
def order_keys(logits, token_ids):
    """Distinct keys, int64 from 0 on, of float32 logits and int64 ids."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)  # no -0.0, which would come below 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    return (ordered << 24) + (16777215 - token_ids)


@triton.jit
def candidates(logits, ids, row, at, C, NAMED: tl.constexpr):
    """Some of a row's logits, ids (int64) and keys; beyond the row a key is -1."""
    mask = at < C
    found = tl.load(logits + row * C + at, mask=mask, other=0.0)
    token_ids = at.to(tl.int64)
    if NAMED:
        token_ids = tl.load(ids + row * C + at, mask=mask, other=0).to(tl.int64)
    return found, token_ids, tl.where(mask, order_keys(found, token_ids), -1)


@triton.jit
def counted(partials, row, slices, SLICES: tl.constexpr):
    """What candidates at and above each digit came to in all slices, int64 [16]."""
    slice_, digit = tl.arange(0, SLICES), tl.arange(0, 16)
    places = (row * slices + slice_)[:, None] * 16 + digit[None, :]
    return tl.sum(tl.load(partials + places, mask=(slice_ < slices)[:, None], other=0), 0)


@triton.jit
def narrowed(counts, wanted, begun, number):
    """The key found so far with one more digit: the largest at which the counts still reach what is wanted. `number`:
    of digits that `begun` has."""
    digit = tl.sum((counts.to(tl.float64) >= wanted).to(tl.int64), 0) - 1
    return begun + (tl.maximum(digit, 0) << (52 - 4 * number))


@triton.jit
def wanted_of(counts, limits, totals, row, number, C, MASS: tl.constexpr):
    """What a search wants to reach: with MASS a share of the total, which the first counts gave, else k candidates."""
    limit = tl.load(limits + row)
    if MASS:
        first = tl.sum(tl.where(tl.arange(0, 16) == 0, counts, 0), 0)
        total = tl.where(number == 0, first, tl.load(totals + row))
        wanted = limit * total.to(tl.float64)
    else:
        total = tl.full((), 0, tl.int64)
        wanted = tl.where((limit > 0) & (limit < C), limit, 1).to(tl.float64)
    return wanted, total


@triton.jit(do_not_specialize=["C", "slices", "number"])
def count_kernel(
    logits, ids, weights, limits, totals, begun, before, partials, C, slices, number,
    MASS: tl.constexpr, NAMED: tl.constexpr, SLICES: tl.constexpr, SLICE: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """Count a slice's candidates, or with MASS their masses, at and above each value of digit `number` of the key that
    `limits` (top_k, top_p) ask for. `begun` int64 [PASSES + 1, R] has the digits before; `partials` int64 [R, slices,
    16] gets the counts, and `before` has those of the digit before."""
    row, place, R = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0)
    key = tl.full((), 0, tl.int64)
    if number > 0:
        counts = counted(before, row, slices, SLICES)
        wanted, total = wanted_of(counts, limits, totals, row, number - 1, C, MASS)
        key = narrowed(counts, wanted, tl.load(begun + (number - 1) * R + row), number - 1)
        if place == 0 and MASS:
            tl.store(totals + row, total)
    if place == 0:
        tl.store(begun + number * R + row, key)
    digit = tl.arange(0, 16)
    least = key + (digit.to(tl.int64) << (52 - 4 * number))
    sums = tl.zeros((16, READ), tl.int64)
    for begin in range(place * SLICE, tl.minimum((place + 1) * SLICE, C), READ):
        at = begin + tl.arange(0, READ)
        _, _, keys = candidates(logits, ids, row, at, C, NAMED)
        if MASS:  # in parts of 2**-40 of the likeliest's
            amounts = (tl.load(weights + row * C + at, mask=at < C, other=0.0) * 1099511627776.0).to(tl.int64)
        else:
            amounts = tl.full((READ,), 1, tl.int64)
        sums += tl.where(keys[None, :] >= least[:, None], amounts[None, :], 0)
    tl.store(partials + (row * slices + place) * 16 + digit, tl.sum(sums, 1))


@triton.jit
def found_key(limits, totals, begun, before, row, slices, C, R, MASS: tl.constexpr, SLICES: tl.constexpr,
              PASSES: tl.constexpr):  # fmt: skip
    """The key that a search has found, with its last digit."""
    counts = counted(before, row, slices, SLICES)
    wanted, _ = wanted_of(counts, limits, totals, row, PASSES - 1, C, MASS)
    return narrowed(counts, wanted, tl.load(begun + (PASSES - 1) * R + row), PASSES - 1)


@triton.jit
def scaled(logits, largest, temperature):
    """A log-probability beside the largest, float32 as the CPU divides."""
    return tl.div_rn(logits - largest, temperature.to(tl.float32))


@triton.jit(do_not_specialize=["C", "slices"])
def weigh_kernel(
    logits, ids, largest, temperatures, top_k, begun, before, floors, weights, C, slices,
    NAMED: tl.constexpr, SLICES: tl.constexpr, SLICE: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """The least key that top-k keeps, into floors int64 [R]; and each candidate's share of the likeliest's probability,
    float32 [R, C], 0 for those below."""
    row, place, R = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0)
    at = place * SLICE + tl.arange(0, SLICE)
    found, _, keys = candidates(logits, ids, row, at, C, NAMED)
    k = tl.load(top_k + row)
    floor = found_key(top_k, floors, begun, before, row, slices, C, R, False, SLICES, PASSES)
    floor = tl.where((k > 0) & (k < C), floor, 0)
    temperature = tl.load(temperatures + row)
    shares = scaled(found, tl.load(largest + row), tl.where(temperature > 0.0, temperature, 1.0))
    # float64's exp: that of float32 is an approximation whose error grows with the distance
    weight = tl.exp(shares.to(tl.float64)).to(tl.float32)
    tl.store(weights + row * C + at, tl.where(keys >= floor, weight, 0.0), mask=at < C)
    if place == 0:
        tl.store(floors + row, floor)


@triton.jit(do_not_specialize=["C", "slices"])
def draw_kernel(
    logits, ids, largest, temperatures, keys, top_p, least, totals, begun, before, floors, best, best_ids, C, slices,
    NAMED: tl.constexpr, SLICES: tl.constexpr, SLICE: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """The best noisy score of a slice's candidates that all filters keep, float64 [R, slices], and its id, int32."""
    row, place, R = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0)
    at = place * SLICE + tl.arange(0, SLICE)
    found, token_ids, order = candidates(logits, ids, row, at, C, NAMED)
    floor = found_key(top_p, totals, begun, before, row, slices, C, R, True, SLICES, PASSES)
    floor = tl.maximum(tl.load(floors + row), tl.where(tl.load(top_p + row) < 1.0, floor, 0))
    temperature = tl.load(temperatures + row)
    shares = scaled(found, tl.load(largest + row), tl.where(temperature > 0.0, temperature, 1.0))
    kept = (at < C) & (order >= floor) & (shares >= tl.load(least + row).to(tl.float32))
    score = tl.full((), float("-inf"), tl.float64)
    first = tl.full((), 2147483647, tl.int32)
    if tl.max(kept.to(tl.int32), 0) > 0:  # noise is dear, and most slices have nothing
        scores = tl.where(kept, noisy(found, token_ids, temperature, tl.load(keys + row)), float("-inf"))
        score = tl.max(scores, 0)
        first = tl.min(tl.where((scores == score) & kept, token_ids, 2147483647), 0).to(tl.int32)
    tl.store(best + row * slices + place, score)
    tl.store(best_ids + row * slices + place, first)


def filtered(launch: Launch, logits_RC: Tensor, ids_RC: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor]:
    """Returns the best noisy scores of slices of each row after its filters, float64 [R, slices], and their ids, int32.

    `logits_RC`: float32, contiguous. `ids_RC`: int64, distinct in a row and below 2**24; None where they are columns.
    """
    assert draws.filters is not None
    (R, C), device, (top_k, top_p, least) = logits_RC.shape, logits_RC.device, draws.filters
    assert C <= 1 << ID_BITS, "ids fit into keys"
    slices = triton.cdiv(C, SLICE)
    constants = {"NAMED": ids_RC is not None, "SLICES": power_of_two(slices), "SLICE": SLICE}
    ids = top_k if ids_RC is None else ids_RC
    largest = logits_RC.amax(1)
    weights, best = torch.empty_like(logits_RC), torch.empty(R, slices, dtype=torch.float64, device=device)
    floors, totals = (torch.empty(R, dtype=torch.int64, device=device) for _ in range(2))
    begun = torch.empty(PASSES, R, dtype=torch.int64, device=device)
    partials = [torch.empty(R, slices, DIGITS, dtype=torch.int64, device=device) for _ in range(2)]

    def search(limits: Tensor, mass: bool) -> Tensor:
        for number in range(PASSES):
            launch(
                count_kernel, (R, slices), logits_RC, ids, weights, limits, totals, begun, partials[1 - number % 2],
                partials[number % 2], C, slices, number, MASS=mass, READ=READ, warps=8, **constants,
            )  # fmt: skip
        return partials[(PASSES - 1) % 2]

    before = search(top_k, mass=False)
    launch(
        weigh_kernel, (R, slices), logits_RC, ids, largest, draws.temperatures_R, top_k, begun, before, floors, weights,
        C, slices, PASSES=PASSES, warps=8, **constants,
    )  # fmt: skip
    before = search(top_p, mass=True)
    best_ids = torch.empty(R, slices, dtype=torch.int32, device=device)
    launch(
        draw_kernel, (R, slices), logits_RC, ids, largest, draws.temperatures_R, draws.keys_R, top_p, least, totals,
        begun, before, floors, best, best_ids, C, slices, PASSES=PASSES, warps=8, **constants,
    )  # fmt: skip
    return best, best_ids
