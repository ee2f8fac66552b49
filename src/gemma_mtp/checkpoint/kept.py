"""Which matrices are kept as the quantised values that a file stores, in place of floating-point numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from gemma_mtp.checkpoint.derived import DerivedTensor
from gemma_mtp.checkpoint.quantisations.bits import FP8_ROWS
from gemma_mtp.files.headers import StoredTensor
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.weights.base import Weight
from gemma_mtp.weights.blocks import KINDS, from_blocks
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.fp8 import Fp8
from gemma_mtp.weights.matrix import Chooser, Embedding, matrices

#: the formats of what is kept as it is stored, by the dtype that it is read as
FORMS: dict[str, type[Weight]] = {**{kind: form for kind, (_, _, form) in KINDS.items()}, FP8_ROWS: Fp8}


def keep_stored_(
    model: Target | Drafter, headers: Mapping[str, StoredTensor], fp8: bool = False
) -> dict[str, StoredTensor]:
    """Make room for quantised values as they are stored, of a model on "meta", in every matrix that is stored as one
    kind of them and is not to be quantised otherwise: for blocks, and with `fp8` for FP8 with a scale for each row or
    tensor.

    Returns how the tensors are to be read. Rows of blocks must be a whole number of two, as the operators read them.
    """
    read = {name: _as_stored(header) if fp8 else header for name, header in headers.items()}
    kinds = _stored_kinds(model, read)
    for matrix in matrices(model):
        of_matrix = set() if matrix.held is not None else kinds[id(matrix.weight)]
        if len(of_matrix) == 1 and of_matrix <= FORMS.keys() and not isinstance(matrix, Chooser):
            form = FORMS[of_matrix.pop()]
            if not (form is Fp8 and isinstance(matrix, Embedding)):  # whose rows the kernels do not look up in FP8
                matrix.convert_(form)
    weights = model.checkpoint_tensors()
    return {name: read[name] if isinstance(weights.get(name), Fp8) else header for name, header in headers.items()}


def _as_stored(header: StoredTensor) -> StoredTensor:
    return (header.as_stored() or header) if isinstance(header, DerivedTensor) else header


def _stored_kinds(model: Target | Drafter, headers: Mapping[str, StoredTensor]) -> Mapping[int, set[str]]:
    """What a dense parameter's parts are stored as, by the parameter's `id`: projections of one input share one."""
    kinds: dict[int, set[str]] = defaultdict(set)
    for name, weight in model.checkpoint_tensors().items():
        if isinstance(weight, Dense):
            whole = weight.tensor if weight.tensor._base is None else weight.tensor._base
            kinds[id(whole)].add(headers[name].dtype)
    return kinds


def holds_stored(view: Weight, header: StoredTensor) -> bool:
    """Whether a weight can take quantised values as they are stored."""
    return header.dtype in FORMS and isinstance(view, FORMS[header.dtype])


def take_stored(view: Weight, header: StoredTensor, stored: Tensor) -> None:
    """Copy rows of blocks or of FP8, uint8, into a weight that holds them, without changing a value."""
    if isinstance(view, Fp8):
        made: Weight = Fp8.of_rows(stored, view.dtype)
    else:
        made = from_blocks(header.dtype, stored, view.dtype)
    for place, tensor in zip(view.kept().values(), made.kept().values(), strict=True):
        place.copy_(tensor)
