"""Groups of values that lie on a grid of 16 levels: a step times -8 to 7, rounded to the dtype that they are in.

Models trained to be quantised are published so (Google's `-qat-q4_0-unquantized`), and unpacked 4 bits are.
Such a group is kept in 4 bits as it is: no value changes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOWEST, HIGHEST = -8, 7
#: groups that are looked at first; where none of them is on a grid, none is sought for the rest
PROBED = 64
#: binary digits of the dtypes that values are rounded to; of others they are taken as they are
DIGITS = {torch.bfloat16: 8, torch.float16: 11}


class Grid(NamedTuple):
    """`exact` [N, G]: which groups lie on a grid. Of these, `numbers` int8 [N, G, group] and `steps` float32 [N, G]."""

    exact: Tensor
    numbers: Tensor
    steps: Tensor


def grid_of(weight_NK: Tensor, group: int) -> Grid | None:
    """Returns the grids of a matrix's groups; None where no group of the first is on one."""
    groups = weight_NK.unflatten(1, (-1, group))
    flat = groups.flatten(0, 1)
    probed = flat[:PROBED]
    possible = probed[probed.any(-1) & _few_magnitudes(probed)]
    if not bool(_found(possible).exact.any()):
        return None
    return Grid(*(part.view(*groups.shape[:2], *part.shape[1:]) for part in _found(flat)))


def _few_magnitudes(groups: Tensor) -> Tensor:
    """Whether groups [M, group] have no more magnitudes than a grid: bool [M]. Costs a tenth of trying the grids."""
    ordered = groups.float().abs().sort(-1).values
    return (ordered.diff(dim=-1) != 0).sum(-1) <= -LOWEST


def _found(groups: Tensor) -> Grid:
    """Of groups [M, group]. The largest magnitude is 1 to 8 steps: each is tried with the groups that are left."""
    values = groups.float()
    numbers = torch.zeros(groups.shape, dtype=torch.int8, device=groups.device)
    steps = torch.zeros(len(groups), device=groups.device)
    exact = ~values.any(-1)
    for most in range(-LOWEST, 0, -1):
        left = (~exact).nonzero().squeeze(1)
        if not len(left):
            break
        tried, middle = _on_steps(values[left], groups[left], most)
        inside = (tried >= LOWEST).all(-1) & (tried <= HIGHEST).all(-1)
        for step in (middle, middle.half().float()):  # steps were mostly float16, which may be all that is allowed
            on = inside & ((tried * step[:, None]).to(groups.dtype) == groups[left]).all(-1)
            place = left[on]
            numbers[place], steps[place], exact[place] = tried[on].to(torch.int8), step[on], True
    return Grid(exact, numbers, steps)


def _on_steps(values: Tensor, groups: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Numbers [M, group], and the steps [M] that all values were rounded from if the largest magnitude is `most` steps:
    the middle of what each of them allows, or what the largest says where values were not rounded."""
    first = values.abs().amax(-1) / most
    numbers = (values / first[:, None]).round()
    step = first
    if groups.dtype in DIGITS:
        mantissa, exponent = torch.frexp(values)
        allowed = torch.ldexp(torch.ones_like(values), exponent - DIGITS[groups.dtype] - 1)
        magnitude = numbers.abs()
        below = torch.where(mantissa.abs() == 0.5, allowed / 2, allowed)  # values are closer below a power of two
        least = torch.where(magnitude > 0, (values.abs() - below) / magnitude, 0).amax(-1)
        greatest = torch.where(magnitude > 0, (values.abs() + allowed) / magnitude, torch.inf).amin(-1)
        step = (least + greatest) / 2
    flipped = numbers.amax(-1) > HIGHEST  # a step below zero, as Q4_0 has where the largest is above
    sign = torch.where(flipped, -1.0, 1.0)
    return numbers * sign[:, None], step * sign
