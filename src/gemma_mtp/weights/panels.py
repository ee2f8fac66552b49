"""A bf16 weight in the order that the native operators multiply with least work. Nothing is rounded."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_mtp.huge_pages import SideBySide, zeros
from gemma_mtp.weights.base import NativeLayout, Weight
from gemma_mtp.weights.dense import Dense


@functools.cache
def _layout() -> tuple[int, int, int]:
    """Weight rows of a group and of a panel, and pairs of columns of a part. Only the native operators read panels."""
    from gemma_mtp import _native

    return _native.GROUP_ROWS, _native.PANEL_ROWS, _native.PART_PAIRS


class Panels(Weight):
    """The layout is that of PANELS in `src/native/weight.h`: rows in groups, of a group the columns in parts, of a part
    the rows in panels, and of a panel two columns after another, row by row.

    A model of 60 GB has no room for a copy beside it. So a matrix is held in this format in place of its usual order;
    it is looked up, saved and made dense again from here.
    """

    format = "panels"
    __slots__ = ("_dtype", "data")

    def __init__(self, data: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        """`data`: bf16 [out, in] in that order. Its rows can be given out in another dtype."""
        self.data, self._dtype = data, dtype

    @classmethod
    def fits(cls, weight: Weight) -> bool:
        """Whether the weight is bf16, and has whole panels of rows and whole steps of 32 columns."""
        if weight.quantised or weight.dtype != torch.bfloat16 or weight.ndim != 2:
            return False
        rows, columns = weight.shape
        _, panel_rows, _ = _layout()
        return rows % panel_rows == 0 and columns % 32 == 0

    @classmethod
    def of(cls, weight: Weight, room: SideBySide | None = None) -> Panels:
        """`room`: where the values are to lie, beside those of other weights."""
        dense = weight.dense().detach()
        made = zeros if room is None else room.zeros
        panels = cls(made(dense.shape, dense.dtype))
        panels.copy_(dense)
        return panels

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def kept(self) -> dict[str, Tensor]:
        return {"data": self.data}

    def native(self) -> NativeLayout:
        return NativeLayout("PANELS", self.data)

    def __getitem__(self, index: Any) -> Dense:
        if isinstance(index, Tensor):
            return Dense(self.rows(index))
        return Dense(self.dense()[index])

    def split(self, sizes: Any) -> list[Weight]:
        return Dense(self.dense()).split(sizes)  # one copy for all

    def copy_(self, weight: Tensor) -> None:
        for rows, columns, part in self._parts():
            part.copy_(_by_panels(weight[rows, columns]))

    def like(self, weight: Tensor) -> Panels:
        return Panels.of(Dense(weight.to(torch.bfloat16)))

    def values(self) -> Tensor:
        return self.dense()

    def dense(self) -> Tensor:
        weight = torch.empty_like(self.data)
        for rows, columns, part in self._parts():
            _by_panels(weight[rows, columns]).copy_(part)
        return weight.to(self._dtype)

    def rows(self, indices: Tensor) -> Tensor:
        GROUP_ROWS, PANEL_ROWS, PART_PAIRS = _layout()
        count, columns = self.data.shape
        pair, row = torch.arange(columns // 2, device=indices.device), indices[..., None]
        group, part = row // GROUP_ROWS * GROUP_ROWS, pair // PART_PAIRS * PART_PAIRS
        rows_beside, pairs_beside = (count - group).clamp(max=GROUP_ROWS), (columns // 2 - part).clamp(max=PART_PAIRS)
        panel = (row - group) // PANEL_ROWS * pairs_beside + (pair - part)
        places = group * (columns // 2) + part * rows_beside + panel * PANEL_ROWS + row % PANEL_ROWS
        return self.data.view(torch.int32).flatten()[places].view(torch.bfloat16).to(self._dtype)

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense())

    def _parts(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows and columns of the weight, and where they are: of whole groups, or of what is left after them,
        [groups, panels, pairs of columns, rows of a panel, 2]."""
        GROUP_ROWS, PANEL_ROWS, PART_PAIRS = _layout()
        count, columns = self.data.shape
        whole = count // GROUP_ROWS * GROUP_ROWS
        for begin, end in ((0, whole), (whole, count)):
            if begin == end:
                continue
            beside = min(end - begin, GROUP_ROWS)
            groups = self.data[begin:end].view(-1, beside * columns)
            for first in range(0, columns, 2 * PART_PAIRS):
                last = min(first + 2 * PART_PAIRS, columns)
                part = groups[:, beside * first : beside * last]
                yield (
                    slice(begin, end),
                    slice(first, last),
                    part.unflatten(1, (beside // PANEL_ROWS, (last - first) // 2, PANEL_ROWS, 2)),
                )


def _by_panels(weight: Tensor) -> Tensor:
    """A view of groups' rows [rows, columns], or of fewer: [groups, panels, pairs of columns, rows of a panel, 2]."""
    GROUP_ROWS, PANEL_ROWS, _ = _layout()
    panels = min(len(weight), GROUP_ROWS) // PANEL_ROWS
    return weight.unflatten(1, (-1, 2)).unflatten(0, (-1, panels, PANEL_ROWS)).transpose(2, 3)
