"""What `gemma-mtp doctor` looks at: the machine, the installation, and what a pair's files say."""

from __future__ import annotations

import os
import platform
import time
import warnings
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from gemma_mtp.backend.cuda.asked import ASKED_BY
from gemma_mtp.backend.cuda.usable import usable_on, why_not_on
from gemma_mtp.backend.device_memory import device_free_bytes
from gemma_mtp.backend.native import native_available, usable
from gemma_mtp.backend.processor import processor
from gemma_mtp.backend.select import kv_dtype
from gemma_mtp.checkpoint import open_source
from gemma_mtp.cli.doctor import ExaminedPair
from gemma_mtp.cpu_clock import CpuClock
from gemma_mtp.engine.cost_cache import cache_directory
from gemma_mtp.engine.pair import choose_device, choose_dtype
from gemma_mtp.measure.plan import Load, takes
from gemma_mtp.measure.plan_models import Planned, held_of, planned
from gemma_mtp.sizes.machine import cores, free_memory, read_bandwidth, total_memory
from gemma_mtp.sizes.run import Loaded, Operators
from gemma_mtp.units import shown_bytes, three_digits
from gemma_mtp.weight_types import WeightTypes, merge, parse_weight_types

#: seconds that the machine is watched, for how busy it is with other things
WATCHED_SECONDS, BUSY_SHARE = 0.5, 0.1
#: modules of what each extra installs, by which it is known to be there
EXTRAS = {
    "chat": ("prompt_toolkit",), "grammar": ("llguidance",), "plot": ("matplotlib",),
    "serve": ("fastapi", "uvicorn", "prometheus_client", "llguidance"), "ray": ("ray", "fastapi"),
    "train": ("tensorboard",), "hub": ("huggingface_hub",), "bench-serve": ("httpx", "httpx_aiohttp"),
}  # fmt: skip
VERSIONS = ("gemma-mtp", "torch", "numpy", "tokenizers")
Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what to do where it is not as it should be."""

    name: str
    found: str
    status: Status = "ok"
    advice: str = ""


def machine_checks() -> list[Check]:
    """Returns what was found of the machine and the installation."""
    clock = CpuClock([os.getpid()])
    time.sleep(WATCHED_SECONDS)
    busy = clock.share_elsewhere()
    total, free = total_memory(), free_memory()
    memory = (
        "not told by this system"
        if total is None or free is None
        else f"{shown_bytes(free)} free of {shown_bytes(total)}"
    )
    return [
        *_processor_checks(),
        Check("memory", memory),
        Check("memory bandwidth", f"{three_digits(read_bandwidth() / 1e9)} GB/s read by all cores, measured now"),
        _busy_check(busy),
        *_gpu_checks(),
        *_installation_checks(),
    ]


def _busy_check(busy: float | None) -> Check:
    if busy is None:
        return Check("other work", "not told by this system")
    found = f"other processes take {busy:.0%} of the processor"
    if busy <= BUSY_SHARE:
        return Check("other work", found)
    return Check(
        "other work", found, "note", "what is measured meanwhile, speeds and costs of rounds, is not to be relied on"
    )


def _processor_checks() -> list[Check]:
    checks = [Check("processor", processor(torch.device("cpu")))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        native = native_available()
    if native:
        from gemma_mtp import _native

        better = ", ".join(_native.isas())
        checks.append(Check("operators", f"native, for {_native.isa()} (of {better})"))
        checks.append(Check("threads", _threads(_native.threads())))
        return checks
    off = os.environ.get("GEMMA_MTP_NATIVE") == "0"
    why = "GEMMA_MTP_NATIVE is 0" if off else str(caught[0].message) if caught else "they were not built"
    advice = "unset GEMMA_MTP_NATIVE" if off else "install a C++ compiler and reinstall gemma-mtp"
    checks.append(Check("operators", f"PyTorch's, which are slower: {why}", "problem", advice))
    return [*checks, Check("threads", _threads(torch.get_num_threads()))]


def _threads(threads: int) -> str:
    there, usable = os.cpu_count(), cores()
    return f"{threads} of {usable} cores" + ("" if usable == there else f" that it may use, of the machine's {there}")


def _gpu_checks() -> list[Check]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        return [Check("GPU", "none that PyTorch sees" + ("" if built else ": this PyTorch is built for CPUs"))]
    checks = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        checks.append(Check(f"GPU {i}", f"{name}, {shown_bytes(free)} free of {shown_bytes(total)}"))
        checks.append(_gpu_backend_check(i))
    return checks


def _gpu_backend_check(number: int) -> Check:
    """Which backend would run a pair on a card, and why not the other."""
    name, reason = f"operators of GPU {number}", why_not_on(torch.device("cuda", number))
    if reason is not None:
        return Check(name, f"PyTorch's, which are slower: the Triton kernels can not run, because {reason}", "note")
    if os.environ.get(ASKED_BY) == "1":
        return Check(name, f"Triton kernels for bfloat16 and quantised weights, as {ASKED_BY}=1 asks; else PyTorch's")
    return Check(
        name, "PyTorch's: the Triton kernels could run, but must be asked for: they are not yet measured", "note",
        f"set {ASKED_BY}=1 to try them with --dtype bfloat16",
    )  # fmt: skip


def _installation_checks() -> list[Check]:
    versions = [f"Python {platform.python_version()}"]
    for name in VERSIONS:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} not installed as a package")
    there = [extra for extra, modules in EXTRAS.items() if all(find_spec(module) is not None for module in modules)]
    missing = [extra for extra in EXTRAS if extra not in there]
    extras = f"{', '.join(there) or 'none'}" + (f"; not there: {', '.join(missing)}" if missing else "")
    advice = f"pip install 'gemma-mtp[{','.join(missing)}]' where you need them" if missing else ""
    costs = cache_directory()
    kept = "off (GEMMA_MTP_CACHE is 0)" if costs is None else f"{len(list(costs.glob('costs-*.json')))} in {costs}"
    checks = [
        Check("versions", ", ".join(versions)), Check("extras", extras, "note" if missing else "ok", advice),
        Check("kept round costs", kept),
    ]  # fmt: skip
    if find_spec("huggingface_hub") is not None:
        from huggingface_hub.constants import HF_HUB_CACHE

        checks.append(
            Check("Hugging Face cache", f"{len(list(Path(HF_HUB_CACHE).glob('models--*')))} models in {HF_HUB_CACHE}")
        )
    return checks


def pair_checks(models: ExaminedPair) -> list[Check]:
    """Returns what configurations say of a pair: whether it fits together and into memory, and how it is stored."""
    given = None if models.drafter is None else str(models.drafter)
    pair = planned(str(models.target), given, models.no_drafter, others=True)
    types = merge(pair.types, parse_weight_types(models.quantize) if models.quantize else WeightTypes())
    device = choose_device(models.device)
    dtype = choose_dtype(models.dtype, device, open_source(str(models.target)))
    checks = [_memory_check(models, as_loaded(pair, types, device, dtype), device)]
    if pair.drafter is None:
        return [
            *checks,
            Check("drafter", "none", "problem", "give --drafter, or download it: gemma-mtp pull NAME-assistant"),
        ]
    checks.append(Check("drafter", f"{pair.drafter_name}: fits the target"))
    dense = str(dtype).removeprefix("torch.")
    stored = ", ".join(f"{part} {kind or dense}" for part, kind in types.parts.items())
    qat = ["qat" in Path(str(name)).name.lower() for name in (models.target, pair.drafter_name)]
    if qat[0] != qat[1] and pair.drafter_name != "bundled":
        which = "the target" if qat[0] else "the drafter"
        checks.append(Check(
            "weights", f"{stored}; by their names only {which} is of a QAT checkpoint", "note",
            "use the drafter of the same checkpoint: QAT to QAT",
        ))  # fmt: skip
    else:
        checks.append(Check("weights", stored))
    return checks


def as_loaded(pair: Planned, types: WeightTypes, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Returns the pair as the backend that would run it there keeps it."""
    kernels = dtype is torch.bfloat16 and usable_on(device)
    operators: Operators = "native" if usable(device, dtype) else "cuda" if kernels else "reference"
    return Loaded(
        pair.target, pair.drafter, types, dtype.itemsize, kv_dtype(device, dtype).itemsize, operators,
        torch.get_num_threads(), held=held_of(pair, types, str(dtype).removeprefix("torch."), kernels),
    )  # fmt: skip


def _memory_check(models: ExaminedPair, run: Loaded, device: torch.device) -> Check:
    load = Load(1, min(8192, run.target.text.max_position_embeddings), 4)
    size, free = takes(run, load, device.type == "cuda").total, device_free_bytes(device)
    found = f"{shown_bytes(size)} with one sequence of up to {load.context} tokens on {device}"
    if free is None or size <= free:
        return Check("fits into memory", found)
    return Check(
        "fits into memory", f"{found}, but {shown_bytes(free)} are free", "problem",
        f"see what fits: gemma-mtp plan {models.target} --device {device.type}",
    )  # fmt: skip
