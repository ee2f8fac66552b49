"""Whether the Triton kernels can run a pair, and why not. Needs no Triton, so that it can say that there is none."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import warnings
from dataclasses import fields
from pathlib import Path

import torch

from gemma_mtp.backend.cuda.asked import ASKED_BY, asked
from gemma_mtp.config import LayerOptions
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.weights.int2 import Int2
from gemma_mtp.weights.matrix import matrices

#: compute capability that the kernels' bf16 products need
LEAST_CAPABILITY = (8, 0)
#: options of layers that the kernels honour; norms multiply in float32 whatever their weights are kept as
HONOURED = {"value_norm", "score_scale", "layer_scalar", "float32_norms"}


def asked_for(device: torch.device) -> bool:
    """Whether the environment asks for the kernels, for models on a card."""
    return device.type == "cuda" and asked()


def usable_on(device: torch.device) -> bool:
    """Whether the kernels are asked for and can run on a device, so that weights can be loaded for them."""
    return asked_for(device) and why_not_on(device) is None


def usable(target: Target, drafter: Drafter | None) -> bool:
    """Whether the kernels are asked for and can run the pair. Warns once, with the reason, where they can not."""
    if not asked_for(target.embed_tokens.device):
        return False
    reason = why_not(target, drafter)
    if reason is not None:
        warnings.warn(
            f"{ASKED_BY}=1 asks for the Triton kernels, but {reason}; decoding goes on with PyTorch's operators, which"
            " are slower.",
            RuntimeWarning,
            stacklevel=3,
        )
    return reason is None


def why_not(target: Target, drafter: Drafter | None) -> str | None:
    """Returns why the kernels can not run the pair, as the part of a sentence, or None where they can."""
    reason = why_not_on(target.embed_tokens.device)
    if reason is not None:
        return reason
    for model in (target, drafter):
        weight = None if model is None else model.embed_tokens
        if weight is not None and weight.dtype is not torch.bfloat16:
            return f"the weights are {str(weight.dtype)[6:]} and not bfloat16 (give --dtype bfloat16)"
        if weight is not None and weight.device != target.embed_tokens.device:
            return f"the drafter is on {weight.device} and not beside its target"
    multiplied = [matrix for model in (target, drafter) if model is not None for matrix in matrices(model)]
    if any(matrix.activations for matrix in multiplied):
        return "they do not round activations by static scales, as the checkpoint does"
    if any(isinstance(matrix.lying, Int2) for matrix in multiplied):
        return "they do not multiply weights of 2 bits"
    options = [target.config.options, *([] if drafter is None else [drafter.config.text.options])]
    unknown = next(filter(None, map(unknown_option, options)), None)
    return None if unknown is None else f"they do not know the layers' option {unknown}"


def unknown_option(options: LayerOptions) -> str | None:
    """Returns an option that says something else than Gemma 4's and that the kernels do not know, as `name = value`."""
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in HONOURED and value != field.default:
            return f"{field.name} = {value!r}"
    return None


def why_not_on(device: torch.device) -> str | None:
    """Returns why the kernels can not run on a device, as the part of a sentence, or None where they can."""
    if device.type != "cuda":
        return f"the models are on {device.type!r} and not on an NVIDIA card"
    if torch.version.hip is not None:
        return "the card is AMD's, and only NVIDIA's are known"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        least, found = (".".join(map(str, one)) for one in (LEAST_CAPABILITY, capability))
        return f"the card has compute capability {found}, and bf16 products need {least}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang")):
        return "there is no C compiler, which Triton needs at the first launch (apt-get install gcc)"
    if not Path(sysconfig.get_path("include", scheme=_headers_scheme()), "Python.h").is_file():
        return "Python's headers are missing, which Triton needs at the first launch (apt-get install python3-dev)"
    from gemma_mtp.backend.cuda.probe import failed_launch

    return failed_launch(device)


def _headers_scheme() -> str:
    """Returns where Triton looks for headers: not where Debian's Python installs packages by default."""
    scheme = sysconfig.get_default_scheme()
    return "posix_prefix" if scheme == "posix_local" else scheme
