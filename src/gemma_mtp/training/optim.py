"""Optimisers and schedules over fp32 masters of a model's weights.

Weights may be trained in bf16, which a CPU with the instructions multiplies several times faster: gradients go to the
masters, steps are taken there, results are rounded back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gemma_mtp.model import target as target_module
from gemma_mtp.weights.matrix import Linear


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it, else fp32."""
    if dtype == "auto":
        fast = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


class Masters:
    """fp32 copies of a model's parameters (fp64 of fp64 ones)."""

    def __init__(self, model: nn.Module) -> None:
        self.working = dict(model.named_parameters())
        self.fp32 = {name: nn.Parameter(_master(p.detach())) for name, p in self.working.items()}

    def accumulate(self) -> None:
        """Add the working gradients to the masters', and clear them."""
        for name, parameter in self.working.items():
            if parameter.grad is not None:
                master = self.fp32[name]
                new = parameter.grad.to(master.dtype)
                master.grad = new if master.grad is None else master.grad.add_(new)
                parameter.grad = None

    def gradient(self, working: Tensor) -> Tensor:
        """The gradient of a working parameter's master, to add to; zeros where there is none yet."""
        (master,) = (self.fp32[name] for name, parameter in self.working.items() if parameter is working)
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return master.grad

    def clip(self, norm: float = 1.0) -> float:
        """Scale the masters' gradients down to `norm` where it is more. Returns what it was."""
        return float(nn.utils.clip_grad_norm_(self.fp32.values(), norm))

    def clear(self) -> None:
        for master in self.fp32.values():
            master.grad = None

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


def _master(p: Tensor) -> Tensor:
    return p.clone() if p.dtype == torch.float64 else p.float().clone()


class Optimiser:
    """AdamW. With a `matrix_lr`, Muon on matrices inside the layers and projections, and AdamW on the rest."""

    def __init__(self, model: nn.Module, masters: Masters, lr: float, matrix_lr: float | None = None) -> None:
        in_layers = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
        matrices = [p for name, p in masters.fp32.items() if name in in_layers]
        tables = [p for name, p in masters.fp32.items() if name not in in_layers and p.ndim == 2]
        vectors = [p for p in masters.fp32.values() if p.ndim == 1]
        # embeddings and norms are not pulled towards zero: rare tokens would fade
        groups: list[dict[str, Any]] = [{"params": tables + vectors, "weight_decay": 0.0}]
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        if matrix_lr is None:
            groups.append({"params": matrices, "weight_decay": 0.1})
        else:
            self.optimisers["muon"] = torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.1, momentum=0.95,
                                                       ns_steps=5, adjust_lr_fn="match_rms_adamw")  # fmt: skip
        self.optimisers["adamw"] = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-10, fused=True)
        self.peaks = {name: [group["lr"] for group in o.param_groups] for name, o in self.optimisers.items()}

    def step(self, lr_share: float) -> None:
        """One step at `lr_share` of the peak learning rates."""
        for name, optimiser in self.optimisers.items():
            for group, peak in zip(optimiser.param_groups, self.peaks[name], strict=True):
                group["lr"] = peak * lr_share
            optimiser.step()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is carried from step to step, named optimiser.parameter.quantity."""
        return {
            f"{name}.{index}.{key}": value
            for name, optimiser in self.optimisers.items()
            for index, state in optimiser.state_dict()["state"].items()
            for key, value in state.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up `tensors` of an earlier run."""
        for name, optimiser in self.optimisers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                owner, index, quantity = key.split(".", 2)
                if owner == name:
                    state.setdefault(int(index), {})[quantity] = value
            optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def cosine(progress: float, warmup: float = 0.03) -> float:
    """Share of the peak learning rate at `progress` (0 to 1) of the run: up, then down half a cosine to zero."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def traceable() -> None:
    """Let torch.compile trace the target without a graph break at its `.item()`."""
    torch.compiler.assume_constant_result(target_module._rounded)
