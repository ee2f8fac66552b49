"""Memory in huge pages: what is given out is as asked for, and apart."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from models import PLE, random_target

from gemma_mtp.checkpoint import load_target, save_target
from gemma_mtp.config import TargetConfig
from gemma_mtp.huge_pages import CHUNK_BYTES, HUGE_PAGE_BYTES, LINE_BYTES, SideBySide, zeros
from gemma_mtp.weight_types import parse_weight_types


@pytest.mark.parametrize("rows", [0, 3, HUGE_PAGE_BYTES // 8, HUGE_PAGE_BYTES // 8 + 1])
def test_zeros_are_of_that_shape_and_dtype(rows: int) -> None:
    found = zeros((rows, 4), torch.bfloat16)
    assert found.shape == (rows, 4) and found.dtype == torch.bfloat16 and found.is_contiguous() and not found.any()


def test_tensors_side_by_side_are_apart() -> None:
    """Of all sizes, some of which do not fit what is left of a chunk, or any chunk."""
    room = SideBySide()
    shapes = [
        (3, 5),
        (0, 5),
        (1, 1),
        (CHUNK_BYTES // 4, 2),
        (7, 3),
        (CHUNK_BYTES // 2, 3),
        (2, 2),
        (CHUNK_BYTES // 8, 4),
    ]
    dtypes = [torch.bfloat16, torch.float32, torch.uint8]
    made = [room.zeros(shape, dtypes[i % 3]) for i, shape in enumerate(shapes)]
    for number, (tensor, shape) in enumerate(zip(made, shapes, strict=True), start=1):
        assert tensor.shape == shape and tensor.dtype == dtypes[(number - 1) % 3] and tensor.is_contiguous()
        assert tensor.data_ptr() % LINE_BYTES == 0 and not tensor.any()
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(made, start=1))
    assert made[0].untyped_storage().data_ptr() == made[2].untyped_storage().data_ptr()


def test_a_loaded_model_lies_in_pages_that_quantised_weights_share(tmp_path: Path) -> None:
    """No tensor lies where another one does, and dense weights have memory of their own, which can be given back."""
    save_target(random_target(config=PLE), TargetConfig(PLE), tmp_path)
    target = load_target(tmp_path, torch.float32, types=parse_weight_types("target=int8"))
    tensors = [*target.parameters(), *target.buffers()]
    places = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors)
    assert all(place + size <= after for (place, size), (after, _) in itertools.pairwise(places))
    storages = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors)
    shared = [tensor for tensor in tensors if storages[tensor.untyped_storage().data_ptr()] > 1]
    assert {tensor.dtype for tensor in shared} == {torch.int8, torch.float32}  # numbers and their scales
    assert not any(isinstance(tensor, torch.nn.Parameter) for tensor in shared)
