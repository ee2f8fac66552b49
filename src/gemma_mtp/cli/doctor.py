"""`gemma-mtp doctor`."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gemma_mtp.cli import options
from gemma_mtp.cli.option_groups import group, option

if TYPE_CHECKING:
    from gemma_mtp.engine.pair import Pair
    from gemma_mtp.measure.acceptance import Prompt
    from gemma_mtp.measure.diagnosis import Finding

#: seconds that the machine is watched, for how busy it is with other things
WATCHED_SECONDS, BUSY_SHARE = 0.5, 0.1
EXTRAS = {
    "grammar": "llguidance", "plot": "matplotlib", "serve": "fastapi", "ray": "ray", "train": "tensorboard",
    "hub": "huggingface_hub", "bench-serve": "httpx",
}  # fmt: skip
VERSIONS = ("gemma-mtp", "torch", "numpy", "safetensors", "tokenizers")
QUESTIONS = (
    "Explain why the sky is blue.", "Write a short story about a lighthouse.", "What is a prime number?",
    "Give three tips for learning a language.",
)  # fmt: skip
PROMPTS, PROMPT_TOKENS = 6, 192
Status = Literal["ok", "note", "problem"]
MARKS: dict[Status, str] = {"ok": " ", "note": "-", "problem": "!"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what to do where it is not as it should be."""

    name: str
    found: str
    status: Status = "ok"
    advice: str = ""


@group(options.DATA)
class DoctorData:
    """What a pair is measured on."""

    data: list[Path] | None = option(
        None,
        "Your prompts, as for acceptance; may be repeated. Default: some questions, or the bundled held-out Python.",
    )


@group(options.OUTPUT)
class DoctorOutput:
    """How it is shown."""

    as_json: bool = option(False, options.JSON, "--json")


def doctor(models: options.PairOptions, given: DoctorData, output: DoctorOutput) -> None:
    """Look at the machine and the installation and, with --target, at a pair: whether it fits, and why few drafts are
    accepted.

    Each cause of low acceptance is measured by itself, and ends in what to do. Exits with 1 where something is wrong.
    """
    import typer

    models.check()
    options.use_threads(models.threads)
    checks = machine_checks()
    findings: list[Finding] = []
    if models.target is not None:
        checks += pair_checks(models)
        findings = _diagnosis(models, given.data)
    if output.as_json:
        found = {"checks": [asdict(check) for check in checks], "diagnosis": [asdict(finding) for finding in findings]}
        print(json.dumps(found))
    else:
        _print(checks, findings)
    if any(check.status == "problem" for check in checks) or any(f.verdict == "cause" for f in findings):
        raise typer.Exit(1)


def machine_checks() -> list[Check]:
    """Returns what was found of the machine and the installation."""
    from gemma_mtp.cpu_clock import CpuClock
    from gemma_mtp.sizes.machine import free_memory, read_bandwidth, shown_bytes, total_memory

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
        Check("memory bandwidth", f"{read_bandwidth() / 1e9:.3g} GB/s read by all cores, measured now"),
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
    import warnings

    import torch

    from gemma_mtp.backend.native import module
    from gemma_mtp.backend.processor import processor

    checks = [Check("processor", processor(torch.device("cpu")))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        native = module()
    if native is not None:
        better = ", ".join(native.isas())
        checks.append(Check("operators", f"native, for {native.isa()} (of {better})"))
        checks.append(Check("threads", f"{native.threads()} of {os.cpu_count()} cores"))
        return checks
    off = os.environ.get("GEMMA_MTP_NATIVE") == "0"
    why = "GEMMA_MTP_NATIVE is 0" if off else str(caught[0].message) if caught else "they were not built"
    advice = "unset GEMMA_MTP_NATIVE" if off else "install a C++ compiler and reinstall gemma-mtp"
    checks.append(Check("operators", f"PyTorch's, which are slower: {why}", "problem", advice))
    return [*checks, Check("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores")]


def _gpu_checks() -> list[Check]:
    import torch

    from gemma_mtp.sizes.machine import shown_bytes

    if not torch.cuda.is_available():
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        return [Check("GPU", "none that PyTorch sees" + ("" if built else ": this PyTorch is built for CPUs"))]
    checks = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        checks.append(Check(f"GPU {i}", f"{name}, {shown_bytes(free)} free of {shown_bytes(total)}"))
    return checks


def _installation_checks() -> list[Check]:
    from gemma_mtp.engine.cost_cache import cache_directory

    versions = [f"Python {platform.python_version()}"]
    for name in VERSIONS:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} not installed as a package")
    there = [extra for extra, package in EXTRAS.items() if find_spec(package) is not None]
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


def pair_checks(models: options.PairOptions) -> list[Check]:
    """Returns what configurations say of a pair: whether it fits together and into memory, and how it is stored."""
    from gemma_mtp.config.pairing import pair_verdict
    from gemma_mtp.measure.plan import Load, takes
    from gemma_mtp.measure.plan_models import planned
    from gemma_mtp.sizes.machine import free_memory, shown_bytes
    from gemma_mtp.sizes.run import Loaded
    from gemma_mtp.weight_types import WeightTypes, merge, parse_weight_types

    given = None if models.drafter is None else str(models.drafter)
    pair = planned(str(models.target), given, models.no_drafter)
    types = merge(pair.types, parse_weight_types(models.quantize) if models.quantize else WeightTypes())
    run = Loaded(pair.target, pair.drafter, types, 2 if pair.narrow else 4, 4, "native")
    size, free = takes(run, Load(1, min(8192, pair.target.text.max_position_embeddings), 4)).total, free_memory()
    found = f"{shown_bytes(size)} with one sequence of up to 8192 tokens"
    fits = free is None or size <= free
    checks = [Check("fits into memory", found) if fits else Check(
        "fits into memory", f"{found}, but {shown_bytes(free or 0)} are free", "problem",
        f"see what fits: gemma-mtp plan {models.target}",
    )]  # fmt: skip
    if pair.drafter is None:
        return [
            *checks,
            Check("drafter", "none", "problem", "give --drafter, or download it: gemma-mtp pull NAME-assistant"),
        ]
    verdict = pair_verdict(pair.target, pair.drafter)
    checks.append(Check("drafter", f"{pair.drafter_name}: {verdict or 'fits the target'}"))
    stored = ", ".join(
        f"{part} {kind or ('bfloat16' if pair.narrow else 'float32')}" for part, kind in types.parts.items()
    )
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


def _diagnosis(models: options.PairOptions, data: Sequence[Path] | None) -> list[Finding]:
    from gemma_mtp.cli.progress import progress
    from gemma_mtp.engine.pair import load_pair
    from gemma_mtp.measure.diagnosis import Finding, compare_prompts, compare_types, diagnose

    with progress("loading") as say:
        pair = models.load()
        if pair.drafter is None:
            return []
        say("measuring")
        plain, templated, foreign = _prompts(pair, data)
        if not plain:
            return [Finding("first drafts", "not measured", "the target's directory has no tokenizer.json; add it")]
        findings = diagnose(pair, templated or plain, foreign)
        if templated:
            findings.append(compare_prompts(pair, plain, templated))
        else:
            findings.append(
                Finding("chat template", "not measured", "the tokenizer has none, or the data has its own form")
            )
        if pair.target.weight_types and models.quantize:
            dense = load_pair(models.target, models.drafter, dtype=models.dtype, device=models.device)
            findings.append(compare_types(pair, dense, templated or plain))
        else:
            why = "the target is stored quantised" if pair.target.weight_types else "the target is not quantised"
            findings.append(Finding("the target's quantisation", "not measured", why))
    return findings


def _prompts(pair: Pair, data: Sequence[Path] | None) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    """Prompts as plain text, the same ones through the chat template if there is one, and text that others wrote."""
    from gemma_mtp.chat.conversation import Conversation
    from gemma_mtp.chat.prompt import chat_ids
    from gemma_mtp.measure.acceptance import Prompt, prompts_of

    if pair.tokenizer is None:
        return [], [], []
    own = prompts_of(pair, options.spread(options.sources_of(data), "*", PROMPTS), PROMPT_TOKENS)
    if data or pair.tokenizer.chat_template is None:
        return own, [], own
    plain = [Prompt(question, question) for question in QUESTIONS]
    templated = [
        Prompt(question, chat_ids(Conversation.of_user(question, None), pair.tokenizer)) for question in QUESTIONS
    ]
    return plain, templated, own


def _print(checks: Sequence[Check], findings: Sequence[Finding]) -> None:
    from gemma_mtp.cli.console import console

    out = console()
    for check in checks:
        out.print(f"{MARKS[check.status]} {check.name}: {check.found}", soft_wrap=True)
        if check.advice:
            out.print(f"    {check.advice}", soft_wrap=True)
    if findings:
        out.print("\nwhy drafts are accepted or not", style="bold", soft_wrap=True)
    for finding in findings:
        out.print(
            f"{'!' if finding.verdict == 'cause' else ' '} {finding.name}: {finding.verdict}: {finding.measured}",
            soft_wrap=True,
        )
        if finding.advice:
            out.print(f"    {finding.advice}", soft_wrap=True)
