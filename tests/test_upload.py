"""The way of stored pieces to a device, on one whose copies are late: nothing is overwritten that one still reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import WIDE, random_target, save_pair, wide_drafter
from torch import Tensor

from gemma_mtp.checkpoint import load, load_drafter, load_target, tensors, upload
from gemma_mtp.checkpoint.upload import Uploads
from gemma_mtp.interop.gguf import export_gguf
from gemma_mtp.weight_types import UNIFORM

CPU = torch.device("cpu")


class Late:
    """Copies that are done when somebody waits for them, in order."""

    def __init__(self, heeded: bool = True) -> None:
        """Not `heeded`: waits do nothing, which is the control."""
        self.asked: list[tuple[Tensor, Tensor]] = []
        self.done = 0
        self.buffers: list[Tensor] = []
        self._heeded = heeded

    def buffer(self, nbytes: int) -> Tensor:
        self.buffers.append(torch.zeros(nbytes, dtype=torch.uint8))
        return self.buffers[-1]

    def copy(self, there: Tensor, here: Tensor) -> None:
        assert any(here.data_ptr() == buffer.data_ptr() for buffer in self.buffers), "a copy from other memory waits"
        self.asked.append((there, here))

    def mark(self) -> Callable[[], None]:
        count = len(self.asked)

        def wait() -> None:
            if self._heeded:
                self.finish(count)

        return wait

    def finish(self, count: int | None = None) -> None:
        for there, here in self.asked[self.done : count]:
            there.copy_(here)
        self.done = max(self.done, count or len(self.asked))


class AtOnce(Late):
    """Copies that are done as they are asked for, as those before an operator of the same stream."""

    def copy(self, there: Tensor, here: Tensor) -> None:
        super().copy(there, here)
        self.finish()


PIECES = [
    torch.randn(7, 9).bfloat16(), torch.randint(-9, 9, (40,)), torch.tensor(2.5), torch.zeros(0, 4),
    torch.randn(6, 50).T, torch.randint(0, 255, (90,), dtype=torch.uint8),
]  # fmt: skip


def uploaded(late: Late) -> list[bool]:
    """Whether each piece is what it was, though its own memory has changed since."""
    way = Uploads(CPU, late)
    before = [piece.clone() for piece in PIECES]
    found = []
    for piece in PIECES:
        given = piece.clone(memory_format=torch.preserve_format)
        found.append(way(given))
        given.zero_()
    late.finish()
    same = [torch.equal(one, other) for one, other in zip(found, before, strict=True)]
    assert [one.dtype for one in found] == [one.dtype for one in before]
    return same


def test_pieces_arrive_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through two buffers, larger ones in parts; a way that does not wait for its buffers is found."""
    monkeypatch.setattr(upload, "BUFFER_BYTES", 64)
    late = Late()
    assert all(uploaded(late)) and len(late.buffers) == upload.BUFFERS
    assert len(late.asked) == sum(math.ceil(piece.nbytes / 64) for piece in PIECES)
    assert not all(uploaded(Late(heeded=False)))


@pytest.mark.parametrize("kind", [*UNIFORM, "Q8_0", "Q4_0"])
def test_models_load_through_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is converted, quantised or kept as blocks behind it is what is without it."""
    save_pair(tmp_path, random_target(5, WIDE["ple"]), wide_drafter(WIDE["ple"], True))
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    if kind not in UNIFORM:
        target, drafter = (tmp_path / f"{name}.gguf" for name in ("target", "drafter"))
        export_gguf(tmp_path / "target", target, kind)
        export_gguf(tmp_path / "drafter", drafter, kind)
    types = UNIFORM.get(kind, UNIFORM["none"])
    monkeypatch.setattr(tensors, "PIECE_BYTES", 7000)

    def loaded() -> list[dict[str, Tensor]]:
        models = (
            load_target(target, torch.bfloat16, types=types.of_target()),
            load_drafter(drafter, torch.bfloat16, types=types.of_drafter()),
        )
        return [
            {f"{name} {part}": tensor for name, weight in model.checkpoint_tensors().items()
             for part, tensor in weight.kept().items()}
            for model in models
        ]  # fmt: skip

    expected, copies = loaded(), AtOnce()
    monkeypatch.setattr(load, "uploads_to", lambda device: Uploads(device, copies))
    found = loaded()
    assert len(copies.asked) > 50
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []
