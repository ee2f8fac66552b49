"""Which configurations a plan is made of: of a known name, a directory, or a config.json alone. Without PyTorch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_mtp.config import PRESETS, DrafterConfig, TargetConfig, parse_drafter_config, parse_target_config
from gemma_mtp.config.pairing import check_pair
from gemma_mtp.errors import CheckpointError
from gemma_mtp.json_files import existing, read_json
from gemma_mtp.locate import BUNDLED, DRAFTER_SUFFIX, GGUF, Role, find_drafter, locate
from gemma_mtp.sizes.run import Held
from gemma_mtp.weight_types import METHOD, Quantisation, WeightTypes, merge, parse_quantization_config

OWNER = "google/"
#: what Google's names have behind the size where the geometry is the same
VARIANTS = re.compile(r"(-qat-q4_0-unquantized)?(-assistant)?$")

#: types of blocks that are multiplied as they are stored, and what they are like
KEPT_BLOCKS: dict[str, Quantisation] = {"Q8_0": "q8_0", "Q4_0": "int4"}
#: beside the fields of a config.json: how the matrices of a GGUF file are kept, and that the files of others'
#: quantisations say it
STORED, MEASURED = "stored as", "measured"
#: where a tool says beside config.json how it quantised
OTHERS_FILE = "hf_quant_config.json"


@dataclass(frozen=True)
class Planned:
    """A pair to plan for. `narrow`: its weights are stored in bfloat16; `types`: those that are stored quantised.
    `measured`: where the checkpoints lie that another tool quantised, of which the files say what is kept."""

    name: str
    target: TargetConfig
    drafter: DrafterConfig | None
    drafter_name: str | None
    types: WeightTypes
    narrow: bool
    measured: Mapping[Role, str] = field(default_factory=dict)


def planned(model: str, drafter: str | None = None, no_drafter: bool = False, others: bool = False) -> Planned:
    """Returns the pair of a known name (`gemma-4-31B-it`), a directory, a config.json, `bundled`, or a name in the
    Hugging Face cache; the drafter is found as for decoding, or as the official one of a known name. `others`: also of
    checkpoints that another tool quantised, which takes PyTorch.

    Raises CheckpointError, ConfigError, PairError or QuantisationError.
    """
    raw, measured = _raw(model, "target", others), dict[Role, str]()
    if isinstance(raw, TargetConfig | DrafterConfig):
        target, stored, narrow = raw, WeightTypes(), True
    else:
        target, stored, narrow = parse_target_config(raw), _types(raw), _narrow(raw)
        measured |= {"target": model} if MEASURED in raw else {}
    if not isinstance(target, TargetConfig):
        raise CheckpointError(f"{model} is a drafter; give its target, and the drafter with --drafter.")
    name = None if no_drafter else drafter or _drafter_of(model)
    config = None
    if name is not None:
        raw = _raw(name, "drafter", others)
        if isinstance(raw, TargetConfig | DrafterConfig):
            read, of_drafter = raw, WeightTypes()
        else:
            read, of_drafter = parse_drafter_config(raw), _types(raw)
            measured |= {"drafter": name} if MEASURED in raw else {}
        if not isinstance(read, DrafterConfig):
            raise CheckpointError(f"{name} is a target, but --drafter must name a drafter.")
        config, stored = read, merge(stored, of_drafter)
        check_pair(target, config)
    return Planned(model, target, config, name, stored, narrow, measured)


def held_of(pair: Planned, types: WeightTypes, dtype: str, fp8: bool) -> Held:
    """Returns the bytes of weights that a pair's own files say, once they are loaded so. `fp8`: by kernels that
    multiply it."""
    if not pair.measured:
        return Held()
    import torch

    from gemma_mtp.checkpoint import held_bytes

    of_role: dict[Role, WeightTypes] = {"target": types.of_target(), "drafter": types.of_drafter()}
    return Held(**{
        role: held_bytes(path, role, getattr(torch, dtype), of_role[role], fp8) for role, path in pair.measured.items()
    })  # fmt: skip


def known_name(name: str) -> str | None:
    """Returns the name of the geometry that an official name has: of its owner and of QAT variants nothing is left."""
    short = name.removeprefix(OWNER)
    match = VARIANTS.search(short)
    assert match is not None
    base = short[: match.start()] + (match[2] or "")
    return base if base in PRESETS else None


def _raw(name: str, role: Role, others: bool) -> TargetConfig | DrafterConfig | Any:
    """Returns an official geometry, or the content of a config.json. What exists as a path comes first."""
    path = Path(name)
    known = None if path.exists() else known_name(name)
    if known is not None:
        return PRESETS[known]
    if not path.exists() and name != BUNDLED and "/" not in name:
        raise CheckpointError(
            f"{name} is neither a directory nor a known name ({', '.join(n for n in PRESETS if 'assist' not in n)});"
            " give one of them, or a config.json."
        )
    found = locate(name, role)
    if not found.is_file():
        existing(found)
    if found.suffix == GGUF or (not (found / "config.json").exists() and any(found.glob(f"*{GGUF}"))):
        return _of_gguf(found, role)
    raw = read_json(found if found.is_file() else found / "config.json")
    if others and found.is_dir() and _is_of_others(found, raw):
        return _of_others(found, role)
    return raw


def _is_of_others(path: Path, raw: Any) -> bool:
    """Whether a config.json, or a file beside it, says that another tool quantised its checkpoint."""
    if not isinstance(raw, dict):
        return False  # the parser of configurations says so
    inner = raw.get("quantization_config")
    method = inner.get("quant_method") if isinstance(inner, dict) else None
    return (path / OTHERS_FILE).is_file() or "quantization" in raw or method not in (None, METHOD)


def _of_others(path: Path, role: Role) -> Any:
    """What a config.json would hold of a checkpoint of floats, which is how others' are read; of one that is not
    known, what is in it."""
    from gemma_mtp.checkpoint import open_source, stored_dtypes  # which take PyTorch

    source = open_source(path, role)
    narrow = stored_dtypes(source) == {"BF16"}
    return {**source.config(), "dtype": "bfloat16" if narrow else "float32", MEASURED: True}


def _of_gguf(path: Path, role: Role) -> dict[str, Any]:
    """What a config.json would hold of a GGUF file, or of a directory with one, and how its matrices are kept: blocks
    of two types as they are, all others as float32."""
    from gemma_mtp.checkpoint.open import open_source  # which takes PyTorch

    source, sizes = open_source(path), Counter[str]()
    config = source.config()
    for tensor in source.tensors().values():
        sizes[tensor.dtype] += tensor.nbytes
    (most, _), *_ = sizes.most_common(1)
    kept = WeightTypes(*[KEPT_BLOCKS.get(most)] * 4)
    stored = kept.of_target() if role == "target" else kept.of_drafter()
    return {**config, "dtype": "bfloat16" if most == "BF16" else "float32", STORED: stored}


def _drafter_of(model: str) -> str | None:
    path = Path(model)
    if path.is_file() and path.suffix != GGUF:  # a config.json alone says nothing of what lies beside it
        return None
    known = None if path.exists() else known_name(model)
    if known is not None:
        return known + DRAFTER_SUFFIX
    found = find_drafter(model)
    return None if found is None else str(found)


def _types(raw: Mapping[str, Any]) -> WeightTypes:
    if STORED in raw:
        kept: WeightTypes = raw[STORED]
        return kept
    return parse_quantization_config(raw.get("quantization_config"))


def _narrow(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json says that weights are stored in bfloat16, which native operators read as it is; without a
    word they are taken to be."""
    nested = raw.get("text_config")
    texts = [raw, nested if isinstance(nested, dict) else {}]
    stored = next((text[name] for text in texts for name in ("dtype", "torch_dtype") if text.get(name)), "bfloat16")
    return str(stored).removeprefix("torch.") == "bfloat16"
