"""Pieces of a matrix in threads: the same bits, in order, and PyTorch's threads as before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gemma_mtp.checkpoint.tensors import Int4Changes
from gemma_mtp.weights import grouped
from gemma_mtp.weights.in_threads import in_threads
from gemma_mtp.weights.int4 import Int4
from gemma_mtp.weights.int8 import Int8


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_each_piece_has_a_thread_and_pytorch_keeps_its_own(three_threads: None) -> None:
    """Each of three pieces waits for the others: they are in three threads, of one PyTorch thread each."""
    together = threading.Barrier(3, timeout=60)

    def work(piece: int) -> tuple[int, int]:
        together.wait()
        return piece, torch.get_num_threads()

    assert in_threads(work, range(3), torch.device("cpu")) == [(0, 1), (1, 1), (2, 1)]
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 3


def test_an_error_is_the_callers(three_threads: None) -> None:
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda piece: 1 // piece, [1, 0, 2], torch.device("cpu"))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("form", [Int8, Int4])
def test_the_same_bits(form: type[grouped.Grouped], three_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "PIECE_ELEMENTS", 640)
    weight = torch.randn(33, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    made, changes = [], []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        matrix = form.empty(weight.shape, torch.bfloat16)
        matrix.copy_(weight)
        counted = Int4Changes()
        counted.count(weight, matrix)
        made.append(matrix)
        changes.append(counted)
    assert torch.equal(made[0].data, made[1].data) and torch.equal(made[0].scales, made[1].scales)
    assert changes[0] == changes[1]
