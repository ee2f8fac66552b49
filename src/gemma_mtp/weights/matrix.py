"""Weight matrices as modules. Each keeps its weight in one format, and can change it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from gemma_mtp.weight_types import Quantisation
from gemma_mtp.weights.activations import ActivationScales, rounded
from gemma_mtp.weights.base import Weight
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.formats import QUANTISED
from gemma_mtp.weights.ordered import Ordered


class Held(nn.Module):
    """A weight of another format than dense, whose tensors move with the model that has it."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self._form: Callable[..., Weight] = type(weight)
        self._dtype = weight.dtype
        for name, tensor in weight.kept().items():
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Weight:
        return self._form(*self._buffers.values(), self._dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the tensors. Their bits stay; a change of dtype changes what the values are given out as."""
        tensors = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        self._dtype = fn(next(iter(tensors.values())).new_empty(0, dtype=self._dtype)).dtype
        for name, tensor in tensors.items():
            self._buffers[name] = fn(tensor.view(torch.uint8)).view(tensor.dtype)
        return self


class Matrix(nn.Module):
    """A weight [..., out, in]. It begins dense, as the parameter `weight`, which is gone in any other format.

    `activations`: what its products are rounded by, part by part of its rows, whatever format it is kept in; empty
    where a checkpoint has no such scales.
    """

    weight: nn.Parameter

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))
        self.held: Held | None = None
        self._order: Tensor | None = None
        self.activations: tuple[ActivationScales, ...] = ()

    @property
    def stored(self) -> Weight:
        """The weight, in whatever format and order it is kept."""
        return self.lying if self._order is None else Ordered(self.lying, self._order)

    @property
    def lying(self) -> Weight:
        """The weight as it lies in memory: in another order of rows after `order_rows_`."""
        return Dense(self.weight) if self.held is None else self.held.weight

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight's values, whatever they are kept as."""
        return self.stored.dtype

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def convert_(self, form: type[Weight], *how: Any) -> None:
        """Keep the weight in this format from now on where it fits; what it was kept as is freed. It can not be trained
        after. `how`: what the format's `of` is told beside the weight."""
        stored = self.stored
        if stored.format != form.format and form.fits(stored):
            self._hold(form.of(stored, *how))

    def order_rows_(self, order_V: Tensor) -> None:
        """Keep the rows in this order from now on: first row `order_V[0]`. It can not be trained after."""
        if self._order is None or not torch.equal(self._order, order_V):
            self._hold(self.stored[order_V], order_V)

    def quantise_(self, kind: Quantisation) -> None:
        """Quantise the weight where its columns allow; it can not be trained after. On "meta", only make room."""
        self.convert_(QUANTISED[kind])

    def dequantise_(self) -> None:
        """Make the weight dense again: of the values that it is multiplied as, rounded to its dtype."""
        if self.held is not None:
            self._hold(Dense(self.stored.dense()))

    def product(self, x: Tensor) -> Tensor:
        """Returns x [..., in] times the transpose of the matrix [out, in]: [..., out] of the dtype of x, rounded where
        `activations` say so."""
        if not self.activations:
            return self.stored.linear(x)
        sizes = [part.rows for part in self.activations]
        if len({part.input for part in self.activations}) == 1:
            products = list(self.stored.linear(rounded(x, self.activations[0].input)).split(sizes, -1))
        else:
            parts = zip(self.stored.split(sizes), self.activations, strict=True)
            products = [weight.linear(rounded(x, part.input)) for weight, part in parts]
        return torch.cat([rounded(y, part.output) for y, part in zip(products, self.activations, strict=True)], -1)

    def gathered_product(self, x_MK: Tensor, index: Tensor) -> Tensor:
        """Returns each row's product with rows of its own, [M, N]; `index` [M, N] picks them. Rounded as `product`."""
        if not self.activations:
            return self.stored.gathered_linear(x_MK, index)
        (part,) = self.activations
        return rounded(self.stored.gathered_linear(rounded(x_MK, part.input), index), part.output)

    def _hold(self, weight: Weight, order_V: Tensor | None = None) -> None:
        self._parameters.pop("weight", None)
        self.held, self._order = None, order_V
        if isinstance(weight, Dense):
            self.weight = nn.Parameter(weight.tensor.detach(), requires_grad=False)
        else:
            self.held = Held(weight)


class Linear(Matrix):
    """A bias-free linear layer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class Chooser(Linear):
    """A linear layer whose results choose experts or clusters. Never quantised: it is small, and a wrong choice costs
    more than a rounded product."""

    def quantise_(self, kind: Quantisation) -> None:
        pass


class Embedding(Matrix):
    """A table [rows, size] whose rows are looked up, and which may be a head too."""

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.stored.rows(token_ids)


def matrices(model: nn.Module) -> list[Matrix]:
    """Returns every matrix of a model."""
    return [module for module in model.modules() if isinstance(module, Matrix)]
