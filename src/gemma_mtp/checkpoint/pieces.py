"""Values of stored tensors read a piece at a time, and their bytes, whatever format the file is in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from gemma_mtp.checkpoint.source import Piece
from gemma_mtp.errors import CheckpointError
from gemma_mtp.files.gguf import BLOCKS
from gemma_mtp.files.headers import StoredTensor
from gemma_mtp.files.pieces import PieceFile

#: dtypes that PyTorch has, by the names that `StoredTensor` gives them
TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "F64": torch.float64,
    "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def read_pieces(pieces: Iterable[Piece]) -> Iterator[Tensor]:
    """Yields the values of each piece, in order, of tensors whose rows lie one after another in their files.

    Each is read by itself, into memory of its own, which is free once the caller lets go of it. Raises CheckpointError
    where a file does not have the bytes, or where PyTorch has no such dtype.
    """
    file: PieceFile | None = None
    try:
        for tensor, rows in pieces:
            if file is None or file.path != tensor.file:
                if file is not None:
                    file.close()
                file = PieceFile(tensor.file)
            yield _read(file, tensor, rows)
    finally:
        if file is not None:
            file.close()


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's own bytes, or a copy's where it is not contiguous or not on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _read(file: PieceFile, tensor: StoredTensor, rows: slice | None) -> Tensor:
    blocks = tensor.dtype in BLOCKS and BLOCKS[tensor.dtype][0] > 1
    if tensor.dtype not in TORCH_DTYPES and not blocks:
        raise CheckpointError(f"{tensor.file} stores {tensor.name} as {tensor.dtype}, which can not be read.")
    first, shape = 0, tensor.shape
    if rows is not None:
        first, last, _ = rows.indices(shape[0])
        shape = (last - first, *shape[1:])
    row_bytes = tensor.nbytes // tensor.shape[0] if rows is not None else 0
    nbytes = tensor.nbytes if rows is None else shape[0] * row_bytes
    values = torch.empty(nbytes, dtype=torch.uint8)
    file.read_into(values.numpy().data, tensor.offset + first * row_bytes)
    if blocks:  # bytes, of which a row is the last dimension
        return values.view(*shape[:-1], tensor.nbytes // math.prod(tensor.shape[:-1]))
    return values.view(TORCH_DTYPES[tensor.dtype]).view(shape)
