"""Weight matrices as modules: dense, quantised, or in the native operators' panels."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_mtp.ops import quantise
from gemma_mtp.ops.quantise import QuantisedMatrix, Weight, can_quantise
from gemma_mtp.weight_types import Quantisation


@functools.cache
def _panel_layout() -> tuple[int, int, int]:
    """Weight rows of a group and of a panel, and pairs of columns of a part. Only the native operators read panels."""
    from gemma_mtp import _native

    return _native.GROUP_ROWS, _native.PANEL_ROWS, _native.PART_PAIRS


class Panels:
    """A bf16 weight [out, in] in the order that the native operators multiply with least work (`src/native/weight.h`):
    its rows in groups, of a group the columns in parts, of a part the rows in panels, and of a panel two columns after
    another, row by row."""

    def __init__(self, weight: Tensor) -> None:
        """Reorder a weight that fits."""
        self.data = torch.empty_like(weight, requires_grad=False, memory_format=torch.contiguous_format)
        for rows, columns, part in self._parts():
            part.copy_(_by_panels(weight.detach()[rows, columns]))

    @staticmethod
    def fit(weight: Tensor) -> bool:
        """Whether the weight has whole panels of rows and whole steps of 32 columns."""
        rows, columns = weight.shape
        _, panel_rows, _ = _panel_layout()
        return weight.dtype == torch.bfloat16 and rows % panel_rows == 0 and columns % 32 == 0

    def dense(self) -> Tensor:
        """The weight in its usual order."""
        weight = torch.empty_like(self.data)
        for rows, columns, part in self._parts():
            _by_panels(weight[rows, columns]).copy_(part)
        return weight

    def rows(self, indices: Tensor) -> Tensor:
        """Some rows of the weight, [..., in] of int64 [...]."""
        GROUP_ROWS, PANEL_ROWS, PART_PAIRS = _panel_layout()
        count, columns = self.data.shape
        pair, row = torch.arange(columns // 2, device=indices.device), indices[..., None]
        group, part = row // GROUP_ROWS * GROUP_ROWS, pair // PART_PAIRS * PART_PAIRS
        rows_beside, pairs_beside = (count - group).clamp(max=GROUP_ROWS), (columns // 2 - part).clamp(max=PART_PAIRS)
        panel = (row - group) // PANEL_ROWS * pairs_beside + (pair - part)
        places = group * (columns // 2) + part * rows_beside + panel * PANEL_ROWS + row % PANEL_ROWS
        return self.data.view(torch.int32).flatten()[places].view(torch.bfloat16)

    def _parts(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows and columns of the weight, and where they are: of whole groups, or of what is left after them,
        [groups, panels, pairs of columns, rows of a panel, 2]."""
        GROUP_ROWS, PANEL_ROWS, PART_PAIRS = _panel_layout()
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
    GROUP_ROWS, PANEL_ROWS, _ = _panel_layout()
    panels = min(len(weight), GROUP_ROWS) // PANEL_ROWS
    return weight.unflatten(1, (-1, 2)).unflatten(0, (-1, panels, PANEL_ROWS)).transpose(2, 3)


class Quantised(nn.Module):
    """A quantised matrix whose tensors move with the model that has it."""

    data: Tensor
    scales: Tensor

    def __init__(self, matrix: QuantisedMatrix) -> None:
        super().__init__()
        self.kind = matrix.kind
        self.register_buffer("data", matrix.data)
        self.register_buffer("scales", matrix.scales)

    @property
    def matrix(self) -> QuantisedMatrix:
        return QuantisedMatrix(self.kind, self.data, self.scales)


class Matrix(nn.Module):
    """A weight [..., out, in]. What takes the place of `weight` leaves an empty one of its dtype and device."""

    weight: nn.Parameter

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))
        self.quantised: Quantised | None = None
        self.panels: Panels | None = None

    @property
    def stored(self) -> Weight:
        """The weight as it is kept in memory; a copy in the usual order of one in panels."""
        if self.panels is not None:
            return self.panels.dense()
        return self.weight if self.quantised is None else self.quantised.matrix

    def quantise_(self, kind: Quantisation) -> None:
        """Quantise the weight where its columns allow; it can not be trained after. On "meta", only make room."""
        if self.quantised is None and can_quantise(self.weight):
            matrix = QuantisedMatrix.empty(kind, self.weight.shape, self.weight.device)
            self.quantised = Quantised(matrix if self.weight.is_meta else matrix.copy_(self.weight))
            self._drop_weight()

    def dequantise_(self) -> None:
        """Make a quantised weight dense again: of the values that it is multiplied as, rounded to `weight`'s dtype."""
        if self.quantised is not None:
            self.weight = nn.Parameter(self.quantised.matrix.dense(self.weight.dtype), requires_grad=False)
            self.quantised = None

    def to_panels_(self) -> Panels | None:
        """Replace a dense weight by its panels where it fits, for inference only; the dense weight is freed."""
        if self.panels is None and self.quantised is None and Panels.fit(self.weight):
            self.panels = Panels(self.weight)
            self._drop_weight()
        return self.panels

    def _drop_weight(self) -> None:
        weight = self.weight
        self.weight = nn.Parameter(torch.empty(0, dtype=weight.dtype, device=weight.device), requires_grad=False)


class Linear(Matrix):
    """A bias-free linear layer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return quantise.linear(x, self.stored)


class Chooser(Linear):
    """A linear layer whose results choose experts or clusters. Never quantised: it is small, and a wrong choice costs
    more than a rounded product."""

    def quantise_(self, kind: Quantisation) -> None:
        pass


class Embedding(Matrix):
    """A table [rows, size] whose rows are looked up, and which may be a head too."""

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.panels is not None:
            return self.panels.rows(token_ids)
        if self.quantised is None:
            return F.embedding(token_ids, self.weight)
        return self.quantised.matrix[token_ids].dequantise().to(self.weight.dtype)
