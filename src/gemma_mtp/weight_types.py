"""What the weights of a pair are stored as, part by part: names, spelling and the record in a checkpoint's config.json.

Four parts can be quantised apart: the target's layers (`target`), its tables and head (`embeddings`: the token table,
which is the head too where the checkpoint ties them, `lm_head` where it does not, and the per-layer table), the
drafter's layers and projections (`drafter`), and its head (`drafter-head`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from gemma_mtp.errors import QuantisationError

Quantisation = Literal["int8", "int4", "q8_0"]
QUANTISATIONS: tuple[Quantisation, ...] = get_args(Quantisation)
#: columns that share a scale
GROUPS: dict[Quantisation, int] = {"int8": 64, "int4": 32, "q8_0": 32}
BITS: dict[Quantisation, int] = {"int8": 8, "int4": 4, "q8_0": 8}

#: `quant_method` of the checkpoints that `gemma-mtp quantize` writes
METHOD = "gemma-mtp"


@dataclass(frozen=True)
class WeightTypes:
    """The quantisation of each part; None: as loaded."""

    target: Quantisation | None = None
    embeddings: Quantisation | None = None
    drafter: Quantisation | None = None
    drafter_head: Quantisation | None = None

    def __bool__(self) -> bool:
        return any(self.parts.values())

    @property
    def parts(self) -> dict[str, Quantisation | None]:
        """The quantisation of each part by the part's name."""
        return {_spelled(name): kind for name, kind in asdict(self).items()}

    def of_target(self) -> WeightTypes:
        """Those of the target's parts."""
        return replace(self, drafter=None, drafter_head=None)

    def of_drafter(self) -> WeightTypes:
        """Those of the drafter's parts."""
        return replace(self, target=None, embeddings=None)

    @property
    def quantised(self) -> dict[str, Quantisation]:
        """The parts that are."""
        return {part: kind for part, kind in self.parts.items() if kind is not None}


#: what a kind alone means; int4 keeps the target's tables and head at int8 (docs/use/quantisation.md has the figures)
UNIFORM: dict[str, WeightTypes] = {
    "none": WeightTypes(),
    "int8": WeightTypes("int8", "int8", "int8", "int8"),
    "int4": WeightTypes("int4", "int8", "int4", "int4"),
    "q8_0": WeightTypes("q8_0", "q8_0", "q8_0", "q8_0"),
}


def parse_weight_types(text: str) -> WeightTypes:
    """`int8`, `int4` or `none` for all parts, `PART=KIND` for one, or several with commas, the later ones deciding.

    Raises QuantisationError for anything else.
    """
    types = WeightTypes()
    for entry in (word.strip() for word in text.split(",")):
        part, separator, kind = entry.partition("=")
        if not separator:
            types = _uniform(entry, text)
        elif part not in types.parts:
            raise QuantisationError(
                f"quantize {text!r} names the part {part!r}, but the parts are {', '.join(types.parts)}."
            )
        else:
            types = replace(types, **{_field(part): _kind(kind, text)})
    return types


def merge(stored: WeightTypes, asked: WeightTypes) -> WeightTypes:
    """Of a checkpoint whose parts are stored as they are, and what was asked for. Raises QuantisationError where a part
    is already quantised otherwise."""
    for part, kind in stored.quantised.items():
        wanted = asked.parts[part]
        if wanted not in (None, kind):
            raise QuantisationError(
                f"the checkpoint's part {part} is already {kind} and can not become {wanted};"
                " quantize the checkpoint it was made from."
            )
    return WeightTypes(**{_field(part): kind or asked.parts[part] for part, kind in stored.parts.items()})


def weight_types_to_hf(types: WeightTypes) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    parts = {part: {"bits": BITS[kind], "group_size": GROUPS[kind]} for part, kind in types.quantised.items()}
    return {"quant_method": METHOD, "symmetric": True, "parts": parts}


def parse_quantization_config(raw: Any) -> WeightTypes:
    """What config.json says of its weights. Raises QuantisationError for what we never write.

    One without a quant_method says nothing of the tensors: Google's unquantised QAT checkpoints have it beside plain
    ones. Where they are not plain, the check of every tensor's dtype says so.
    """
    if raw is None or (isinstance(raw, dict) and raw.get("quant_method") is None):
        return WeightTypes()
    method = raw.get("quant_method") if isinstance(raw, dict) else raw
    if method != METHOD:
        raise QuantisationError(
            f"config.json has a quantization_config of quant_method {method!r}, which can not be read; give the"
            " unquantised checkpoint, and --quantize to quantise it."
        )
    parts = raw.get("parts")
    sizes = [(BITS[kind], GROUPS[kind]) for kind in QUANTISATIONS]
    named: dict[str, Quantisation] = {}
    for part, entry in parts.items() if isinstance(parts, Mapping) else [("", None)]:
        size = (entry.get("bits"), entry.get("group_size")) if isinstance(entry, Mapping) else None
        if part not in WeightTypes().parts or size not in sizes:
            raise QuantisationError(
                f"config.json has a quantization_config with parts {parts!r}, but expected are"
                f" {', '.join(WeightTypes().parts)}, with bits and group_size of {' or '.join(map(str, sizes))};"
                " restore it, or quantise the checkpoint anew."
            )
        named[_field(part)] = QUANTISATIONS[sizes.index(size)]
    return WeightTypes(**named)


def _uniform(kind: str, text: str) -> WeightTypes:
    if kind not in UNIFORM:
        raise QuantisationError(
            f"quantize {text!r} is not known; use {', '.join(UNIFORM)}, or PART=KIND, such as target=int4,drafter=int8."
        )
    return UNIFORM[kind]


def _kind(kind: str, text: str) -> Quantisation | None:
    if kind == "none":
        return None
    for known in QUANTISATIONS:
        if kind == known:
            return known
    raise QuantisationError(
        f"quantize {text!r} asks for {kind!r}, but must ask for {', '.join(QUANTISATIONS)} or none."
    )


def _field(part: str) -> str:
    return part.replace("-", "_")


def _spelled(field: str) -> str:
    return field.replace("_", "-")
