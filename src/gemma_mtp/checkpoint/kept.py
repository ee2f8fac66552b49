"""Which matrices are kept as the blocks of quantised values that a file stores, in place of floating-point numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from gemma_mtp.files.headers import StoredTensor
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.weights.base import Weight
from gemma_mtp.weights.blocks import KINDS, from_blocks
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.matrix import Chooser, matrices


def keep_blocks_(model: Target | Drafter, headers: Mapping[str, StoredTensor]) -> None:
    """Make room for blocks, of a model on "meta", in every matrix that is stored as one kind of them and is not to be
    quantised otherwise. Rows must be a whole number of two blocks, as the operators read them."""
    kinds = _stored_kinds(model, headers)
    for matrix in matrices(model):
        of_matrix = set() if matrix.held is not None else kinds[id(matrix.weight)]
        if len(of_matrix) == 1 and of_matrix <= KINDS.keys() and not isinstance(matrix, Chooser):
            matrix.convert_(KINDS[of_matrix.pop()][2])


def _stored_kinds(model: Target | Drafter, headers: Mapping[str, StoredTensor]) -> Mapping[int, set[str]]:
    """What a dense parameter's parts are stored as, by the parameter's `id`: projections of one input share one."""
    kinds: dict[int, set[str]] = defaultdict(set)
    for name, weight in model.checkpoint_tensors().items():
        if isinstance(weight, Dense):
            whole = weight.tensor if weight.tensor._base is None else weight.tensor._base
            kinds[id(whole)].add(headers[name].dtype)
    return kinds


def holds_blocks(view: Weight, header: StoredTensor) -> bool:
    """Whether a weight can take blocks as they are stored."""
    return header.dtype in KINDS and isinstance(view, KINDS[header.dtype][2])


def take_blocks(view: Weight, header: StoredTensor, stored: Tensor) -> None:
    """Copy blocks, uint8 [..., bytes of a row], into a weight that holds them, without changing a value."""
    made = from_blocks(header.dtype, stored, view.dtype)
    for place, tensor in zip(view.kept().values(), made.kept().values(), strict=True):
        place.copy_(tensor)
