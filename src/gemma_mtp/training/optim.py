"""Optimiser and schedule: Muon for the layers' matrices, AdamW for the rest, learning rate by share of wall time.

Weights are trained in bf16, which a CPU with the instructions multiplies several times faster, against fp32 masters.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gemma_mtp.model import target as target_module
from gemma_mtp.ops.linear import Linear


class Masters:
    """fp32 copies of a model's parameters: gradients go in, steps are taken there, results are rounded back."""

    def __init__(self, model: nn.Module) -> None:
        self.working = dict(model.named_parameters())
        self.fp32 = {name: nn.Parameter(p.detach().float().clone()) for name, p in self.working.items()}

    def gather_gradients(self) -> float:
        """Move the working gradients to the masters, clipped to norm 1. Returns the norm before clipping."""
        for name, parameter in self.working.items():
            self.fp32[name].grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        return float(nn.utils.clip_grad_norm_(self.fp32.values(), 1.0))

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the working parameters."""
        for name, parameter in self.working.items():
            parameter.copy_(self.fp32[name])

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.fp32.items():
            parameter.copy_(tensors[name])
        self.publish()


class Optimiser:
    """Muon on matrices inside the layers and projections; AdamW on embeddings and norm weights."""

    def __init__(self, model: nn.Module, masters: Masters, matrix_lr: float, embedding_lr: float) -> None:
        in_layers = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
        matrices = [p for name, p in masters.fp32.items() if name in in_layers]
        tables = [p for name, p in masters.fp32.items() if name not in in_layers and p.ndim == 2]
        vectors = [p for p in masters.fp32.values() if p.ndim == 1]
        self.muon = torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.1, momentum=0.95, ns_steps=5,
                                     adjust_lr_fn="match_rms_adamw")  # fmt: skip
        groups = [
            {"params": tables, "lr": embedding_lr, "weight_decay": 0.0},
            {"params": vectors, "lr": embedding_lr, "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, fused=True)
        self.peaks = [(group, group["lr"]) for o in (self.muon, self.adam) for group in o.param_groups]

    def step(self, lr_share: float) -> None:
        """One step at `lr_share` of the peak learning rates."""
        for group, peak in self.peaks:
            group["lr"] = peak * lr_share
        self.muon.step()
        self.adam.step()


def trapezoid(progress: float, warmup: float = 0.02, decay: float = 0.45) -> float:
    """Share of the peak learning rate at `progress` (0 to 1) of the run: up, flat, then linearly to zero."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return max(0.0, min(1.0, (1.0 - progress) / decay))


def save_masters(masters: Masters, path: Path) -> None:
    """Write the fp32 weights under a temporary name, then rename."""
    temporary = path.with_suffix(".tmp")
    save_file({name: p.detach() for name, p in masters.fp32.items()}, temporary)
    temporary.replace(path)


def traceable() -> None:
    """Let torch.compile trace the target without a graph break at its `.item()`."""
    torch.compiler.assume_constant_result(target_module._rounded)
