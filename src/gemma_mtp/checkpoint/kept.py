"""Which matrices are kept as the quantised values that a file stores, in place of floating-point numbers; and what
their products are rounded by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor

from gemma_mtp.checkpoint.derived import DerivedTensor, activations_of
from gemma_mtp.checkpoint.quantisations.bits import FP8_ROWS
from gemma_mtp.checkpoint.quantisations.gemma import INTEGER_ROWS
from gemma_mtp.files.headers import StoredTensor
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.weights.activations import ActivationScales
from gemma_mtp.weights.base import Weight
from gemma_mtp.weights.blocks import KINDS, from_blocks
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.fp8 import Fp8
from gemma_mtp.weights.grouped import Grouped
from gemma_mtp.weights.matrix import Chooser, Embedding, Matrix, matrices

#: the formats of what is kept as it is stored, by the dtype that it is read as
FORMS: dict[str, type[Weight]] = {
    **{kind: form for kind, (_, _, form) in KINDS.items()}, **INTEGER_ROWS, FP8_ROWS: Fp8,
}  # fmt: skip


def keep_stored_(
    model: Target | Drafter, headers: Mapping[str, StoredTensor], fp8: bool = False
) -> dict[str, StoredTensor]:
    """Make room for quantised values as they are stored, of a model on "meta", in every matrix all of whose parts one
    format can hold so and that is not to be quantised otherwise: for blocks, for rows of whole numbers, and with `fp8`
    for FP8 with a scale for each row or tensor.

    Returns how the tensors are to be read. Rows must be a whole number of two blocks, as the operators read them.
    """
    views = _dense_views(model)
    for matrix in matrices(model):
        kind = _common([kinds_of(headers[name], fp8) for name in views.get(id(matrix), ())])
        if kind is not None and _suits(matrix, FORMS[kind]):
            matrix.convert_(FORMS[kind])
    weights, dense = model.checkpoint_tensors(), {name for names in views.values() for name in names}
    return {name: _as_kept(header, weights[name]) if name in dense else header for name, header in headers.items()}


def set_activations_(model: Target | Drafter, headers: Mapping[str, StoredTensor]) -> None:
    """Let every matrix of a dense model round its products by the scales that a checkpoint has for them."""
    views, weights = _dense_views(model), model.checkpoint_tensors()
    for matrix in matrices(model):
        names = views.get(id(matrix), ())
        scales = [activations_of(headers[name]) for name in names]
        if any(any(pair) for pair in scales):
            parts = zip(names, scales, strict=True)
            matrix.activations = tuple(ActivationScales(weights[name].shape[0], *pair) for name, pair in parts)


def kinds_of(header: StoredTensor, fp8: bool) -> Sequence[str]:
    """Returns the kinds that a tensor can be kept as without changing a value, the smallest first."""
    if not isinstance(header, DerivedTensor):
        return [header.dtype] if header.dtype in FORMS else []
    return [kind for kind in header.undecoded if fp8 or kind != FP8_ROWS]


def _dense_views(model: Target | Drafter) -> dict[int, list[str]]:
    """The names of what a dense matrix holds, in the order of its rows, by the matrix's `id`: projections of one input
    share one."""
    of_memory = {id(matrix.weight): id(matrix) for matrix in matrices(model) if matrix.held is None}
    found: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for name, weight in model.checkpoint_tensors().items():
        if isinstance(weight, Dense):
            whole = weight.tensor if weight.tensor._base is None else weight.tensor._base
            if id(whole) in of_memory:
                found[of_memory[id(whole)]].append((int(weight.tensor.storage_offset()), name))
    return {matrix: [name for _, name in sorted(parts)] for matrix, parts in found.items()}


def _common(kinds: Sequence[Sequence[str]]) -> str | None:
    """The first kind that all parts have."""
    return next((kind for kind in kinds[0] if all(kind in other for other in kinds)), None) if kinds else None


def _suits(matrix: Matrix, form: type[Weight]) -> bool:
    if isinstance(matrix, Chooser):
        return False
    return not (form is Fp8 and isinstance(matrix, Embedding))  # whose rows the kernels do not look up in FP8


def _as_kept(header: StoredTensor, weight: Weight) -> StoredTensor:
    """How a tensor is read for the weight that holds it."""
    if not isinstance(header, DerivedTensor):
        return header
    kind = next((kind for kind in header.undecoded if FORMS[kind] is type(weight)), None)
    return header if kind is None else header.as_stored(kind)


def holds_stored(view: Weight, header: StoredTensor) -> bool:
    """Whether a weight can take quantised values as they are stored."""
    return header.dtype in FORMS and isinstance(view, FORMS[header.dtype])


def take_stored(view: Weight, header: StoredTensor, stored: Tensor) -> None:
    """Copy rows of blocks, of whole numbers or of FP8, uint8, into a weight that holds them, without changing a
    value."""
    if header.dtype in KINDS:
        made = from_blocks(header.dtype, stored, view.dtype)
    else:
        assert isinstance(view, Grouped)
        made = type(view).of_rows(stored, view.scales.shape[-1], view.dtype)
    for place, tensor in zip(view.kept().values(), made.kept().values(), strict=True):
        place.copy_(tensor)
