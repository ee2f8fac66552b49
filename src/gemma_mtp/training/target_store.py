"""The target's pass over each text kept on disk, for runs that go through their data several times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_mtp.checkpoint.tensor_files import load_tensors, save_tensors
from gemma_mtp.config import LayerType
from gemma_mtp.training.examples import Batch
from gemma_mtp.training.unroll import TargetRows


class TargetStore:
    """One file for each text, by its number in the example set: a `StoredRows`. Padding is not kept."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, block: Batch, compute: Callable[[Tensor], TargetRows]) -> TargetRows:
        paths = [self.directory / f"{index:08}.safetensors" for index in block.indices]
        if all(path.exists() for path in paths):
            length, device = block.tokens_BT.shape[1], block.tokens_BT.device
            stored = [load_tensors(path)[0] for path in paths]
            return _stacked([{name: x.to(device) for name, x in tensors.items()} for tensors in stored], length)
        rows = compute(block.tokens_BT)
        for b, path in enumerate(paths):
            save_tensors(path, {name: x[b, : block.lengths[b]] for name, x in _named(rows).items()})
        return rows


def _named(rows: TargetRows) -> dict[str, Tensor]:
    named = {"embeds": rows.embeds_BTD, "hidden": rows.hidden_BTD}
    for kind, (keys, values) in rows.donor_kv.items():
        named |= {f"{kind}.keys": keys, f"{kind}.values": values}
    return named


def _stacked(texts: list[dict[str, Tensor]], length: int) -> TargetRows:
    """Rows of texts side by side, zeros after their ends."""
    padded = {
        name: torch.stack([F.pad(t[name], (0, 0) * (t[name].ndim - 1) + (0, length - len(t[name]))) for t in texts])
        for name in texts[0]
    }
    kinds = {name.removesuffix(".keys") for name in padded if name.endswith(".keys")}
    donor_kv = {cast("LayerType", kind): (padded[f"{kind}.keys"], padded[f"{kind}.values"]) for kind in kinds}
    return TargetRows(padded["embeds"], padded["hidden"], donor_kv)
