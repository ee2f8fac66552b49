"""What recipes are filled in with: a pair, how it is used, and the machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_mtp.decoding.round_costs import LONGEST
from gemma_mtp.errors import DataError, OptionError, PairError, SamplingError
from gemma_mtp.locate import BUNDLED, GGUF, bundled_directory, is_hub_name, locate
from gemma_mtp.measure.plan import Load, largest_context, takes
from gemma_mtp.measure.plan_models import OWNER, known_name, planned
from gemma_mtp.sizes.machine import cores
from gemma_mtp.sizes.run import Loaded

#: drafts a round that vLLM's own recipes give for the official pairs (the least of a range)
RECOMMENDED = {"gemma-4-E2B-it": 2, "gemma-4-E4B-it": 4, "gemma-4-12B-it": 4, "gemma-4-26B-A4B-it": 4,
               "gemma-4-31B-it": 4}  # fmt: skip
DEFAULT_DRAFTS = 3
GIB = 2**30
#: the share of a GPU's memory that a runtime is given at most, and what its own buffers are given beside the plan
MOST_SHARE, SPARE_SHARE = 0.95, 0.05


@dataclass(frozen=True)
class Drafts:
    """Drafts a round (K), and where the number comes from."""

    count: int
    source: str


@dataclass(frozen=True)
class Given:
    """Values for templates. `target` and `drafter` are paths or the hub's names.

    form            directory, hub or gguf: what the checkpoints are
    context         tokens of a sequence, as many as fit; `wanted_context` is what was asked for
    memory_share    share of the GPU's memory that the plan takes; None where it is not known or does not fit
    kv_gib          whole GiB that keys and values of all sequences take, as runtimes are told it
    total, memory   bytes that the plan takes, and that the machine has
    """

    name: str
    target: str
    drafter: str
    form: str
    k: int
    k_source: str
    device: str
    context: int
    wanted_context: int
    sequences: int
    kv_gib: int
    total: int
    memory: int | None
    memory_share: float | None
    fits: bool | None
    centroids: bool
    moe: bool
    text_only: bool
    quantised: bool
    threads: int
    drafter_has_tokenizer: bool

    @property
    def target_gguf(self) -> str:
        return self.target if self.form == "gguf" else f"{self.name}-BF16.gguf"

    @property
    def drafter_gguf(self) -> str:
        return self.drafter if self.form == "gguf" else f"mtp-{self.name}-BF16.gguf"

    def values(self) -> dict[str, Any]:
        return {**vars(self), "target_gguf": self.target_gguf, "drafter_gguf": self.drafter_gguf}


def given(
    target: str, drafter: str | None, drafts: Drafts | None, device: str, context: int | None, sequences: int,
    memory: int | None,
) -> Given:  # fmt: skip
    """Returns the values of a pair, given by names or paths, for a machine with `memory` bytes.

    Raises CheckpointError, ConfigError, PairError, OptionError or SamplingError.
    """
    pair = planned(target, drafter)
    if pair.drafter is None or pair.drafter_name is None:
        raise PairError(f"{target} has no drafter that is found by its name; give --drafter.")
    most = pair.target.text.max_position_embeddings
    wanted = min(8192, most) if context is None else context
    for name, value, high in (("--context", wanted, most), ("--sequences", sequences, 4096)):
        if not 1 <= value <= high:
            raise SamplingError(f"{name} is {value}, but must be from 1 to {high}.")
    loaded = Loaded(pair.target, pair.drafter, pair.types, 2 if pair.narrow else 4, 2, "reference", cores())
    gpu, k = device == "cuda", drafts or default_drafts(target)
    fitting = wanted if memory is None else largest_context(loaded, Load(sequences, wanted, k.count), memory, gpu)
    used = min(wanted, fitting) or wanted
    taken = takes(loaded, Load(sequences, used, k.count), gpu)
    fits = None if memory is None else taken.total <= memory
    share = math.ceil(100 * (taken.total / memory + SPARE_SHARE)) / 100 if memory and gpu and fits else None
    place, form = _place(target, "target")
    drafter_place, drafter_form = _place(pair.drafter_name, "drafter")
    if "gguf" in (form, drafter_form) and form != drafter_form:
        raise OptionError("one of the pair is a GGUF file and the other is not; give both in one form.")
    return Given(
        name=_short(place), target=place, drafter=drafter_place,
        form="hub" if "hub" in (form, drafter_form) else form, k=k.count, k_source=k.source, device=device,
        context=used, wanted_context=wanted, sequences=sequences, kv_gib=max(1, math.ceil(taken.kv / GIB)),
        total=taken.total, memory=memory,
        memory_share=None if share is None else min(MOST_SHARE, share), fits=fits,
        centroids=pair.drafter.use_ordered_embeddings, moe=pair.target.text.enable_moe_block,
        text_only=pair.target.model_type.endswith("_text"),
        quantised=any(kind is not None for kind in pair.types.parts.values()), threads=cores(),
        drafter_has_tokenizer=form == "gguf" or (Path(drafter_place) / "tokenizer.json").is_file(),
    )  # fmt: skip


def default_drafts(target: str) -> Drafts:
    """Returns the drafts a round where nothing was measured."""
    name = known_name(target)
    if name in RECOMMENDED:
        return Drafts(RECOMMENDED[name], f"what vLLM's recipes give for {name}; not measured here")
    return Drafts(DEFAULT_DRAFTS, "a default, not measured for this pair; `gemma-mtp acceptance --json` measures")


def asked_drafts(count: int) -> Drafts:
    """Returns what --draft-tokens says. Raises SamplingError."""
    if not 1 <= count <= LONGEST:
        raise SamplingError(f"--draft-tokens is {count}, but must be from 1 to {LONGEST}.")
    return Drafts(count, "given")


def reported_drafts(report: Any, path: Path) -> Drafts:
    """Returns the drafts a round that pay by a report of `gemma-mtp acceptance --json`: the first setting's that was
    measured undisturbed. Raises DataError for what is no such report, and where drafting does not pay by it."""
    settings = report.get("settings") if isinstance(report, Mapping) else None
    if not isinstance(settings, list) or not all(isinstance(one, Mapping) for one in settings):
        raise DataError(f"{path} is no report of acceptance; give what gemma-mtp acceptance --json printed.")
    found = [(one.get("best_draft_tokens"), str(one.get("label"))) for one in settings]
    quiet = [(best, label) for best, label in found if type(best) is int]
    if not quiet:
        raise DataError(f"{path} says of no setting how many drafts pay, because the machine was busy; measure again.")
    best, label = quiet[0]
    if best < 1:
        raise DataError(f"{path} says that drafting does not pay ({label}); give --draft-tokens to draft all the same.")
    if best > LONGEST:
        raise DataError(f"{path} says {best} drafts a round, but the most is {LONGEST}; give --draft-tokens.")
    return Drafts(
        best, f"fastest by {path.name} ({label}) at the costs of gemma-mtp's own rounds where it was measured"
    )


def _place(name: str, role: Any) -> tuple[str, str]:
    """Where a checkpoint lies for others, and its form."""
    path = Path(name)
    if path.exists() or name == BUNDLED:
        found = (bundled_directory() / role if name == BUNDLED else path).resolve()
        if found.is_file() and found.suffix != GGUF:
            found = found.parent
        return str(found), "gguf" if found.suffix == GGUF else "directory"
    if known_name(name) is not None:
        return name if name.startswith(OWNER) else OWNER + name, "hub"
    return (name, "hub") if is_hub_name(name) else (str(locate(name, role)), "directory")


def _short(place: str) -> str:
    """What files and served models are called."""
    if place == str((bundled_directory() / "target").resolve()):
        return "gemma-mtp-bundled"
    stem = place.rstrip("/").rpartition("/")[2].removesuffix(GGUF)
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in stem) or "model"
