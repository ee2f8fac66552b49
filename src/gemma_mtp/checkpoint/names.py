"""Which stored tensor is which of the model's, whatever tool wrote the checkpoint: pure functions of sets of names.

Official names are those of a text-only checkpoint: `model.layers.0…`, `lm_head.weight`. Tools put the text model at
other places (`model.language_model.`, `language_model.model.`, `language_model.`, none) and wrap it (`module.`,
`_orig_mod.`, `base_model.model.`). Nothing is guessed from one name: a place is taken only where all names of the text
model are found there, and only where no other place has them all too.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from gemma_mtp.errors import CheckpointError

MODEL = "model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: parts of names that torch.compile, DDP, FSDP and activation checkpointing put anywhere; no official name has them
WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: what PEFT puts before the model that it wraps
PEFT = "base_model.model."
#: parts of names of what text decoding does not use: towers, their projections, and buffers that are computed anew
OUTSIDE_TEXT = frozenset({
    "vision_tower", "audio_tower", "embed_vision", "embed_audio", "vision_embedder", "multi_modal_projector",
    "rotary_emb", "embed_scale",
})  # fmt: skip
#: tensors that every text model has, by which its places are found
ANCHORS = ("layers.0.input_layernorm.weight", "norm.weight", "embed_tokens.weight")


def find_tensors(found: Collection[str], needed: Collection[str], optional: Collection[str] = ()) -> dict[str, str]:
    """The stored name of each official name that is there, all in one place.

    `needed` are all names that the configuration calls for, of which the embedding or the head may be missing, as one
    may stand for both. Where no place has them all, the one with the most is taken, and names are missing from the
    answer. Raises CheckpointError where two places have them all, or where two stored names mean the same tensor.
    """
    plain = _unwrapped(found)
    telling = [name for name in needed if name not in (EMBEDDING, HEAD)]
    places = {prefix: _placed(plain, {*needed, *optional}, prefix) for prefix in _prefixes(plain)}
    complete = [prefix for prefix, names in places.items() if all(name in names for name in telling)]
    if len(complete) > 1:
        shown = " and ".join(repr(prefix) for prefix in complete)
        raise CheckpointError(
            f"the checkpoint holds the text model more than once, under the prefixes {shown}; remove all but one."
        )
    if complete:
        return places[complete[0]]
    return max(places.values(), key=len, default={})


def unused_tensors(found: Collection[str], used: Collection[str], shared_layers: Sequence[int]) -> list[str]:
    """Stored names that nothing was read from, though they might belong to the text model.

    Not among them: vision and audio, buffers, and keys and values of layers in `shared_layers`, which official
    checkpoints have and no model reads.
    """
    taken = set(used)
    return sorted(
        name
        for name in found
        if name not in taken and not OUTSIDE_TEXT & set(name.split(".")) and not _is_shared(name, shared_layers)
    )


def missing_tensor(name: str, found: Collection[str]) -> str:
    """The sentence that says so, with a few of the names that are there."""
    near = sorted(found, key=lambda other: (-_likeness(name, other), other))
    shown = (
        f"holds {', '.join(near[:3])}{f' and {len(found) - 3} more' if len(found) > 3 else ''}" if found else "is empty"
    )
    return (
        f"the checkpoint has no tensor {name}, which its config.json calls for; it {shown}; restore either from the"
        " source."
    )


def _likeness(one: str, other: str) -> int:
    """Characters that two names have in common at their beginnings and at their ends."""
    return sum(
        len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))
        for a, b in ((one, other), (one[::-1], other[::-1]))
    )


def _unwrapped(found: Collection[str]) -> dict[str, str]:
    """Stored names by what is left of them without what wraps the model."""
    plain: dict[str, str] = {}
    for name in found:
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        while short.startswith(PEFT):
            short = short.removeprefix(PEFT)
        if short in plain:
            raise CheckpointError(f"the checkpoint holds {short} twice, as {plain[short]} and as {name}; remove one.")
        plain[short] = name
    return plain


def _prefixes(plain: Mapping[str, str]) -> list[str]:
    """Where a text model may be, as what stands there for `model.`."""
    return sorted({
        name.removesuffix(anchor) for name in plain for anchor in ANCHORS if f".{name}".endswith(f".{anchor}")
    })  # fmt: skip


def _placed(plain: Mapping[str, str], wanted: Collection[str], prefix: str) -> dict[str, str]:
    """Stored names of what is wanted, where `prefix` stands for `model.`."""
    placed: dict[str, str] = {}
    for name in wanted:
        if name.startswith(MODEL):
            candidates = iter([prefix + name.removeprefix(MODEL)])
        else:  # beside the text model, or beside what holds it
            candidates = (outer + name for outer in _outer(prefix))
        place = next((candidate for candidate in candidates if candidate in plain), None)
        if place is not None:
            placed[name] = plain[place]
    return placed


def _outer(prefix: str) -> Iterator[str]:
    """The prefix and what is left as its last parts are taken off: `a.b.`, `a.`, nothing."""
    while prefix:
        yield prefix
        prefix = prefix[: prefix[:-1].rfind(".") + 1]
    yield ""


def _is_shared(name: str, shared_layers: Sequence[int]) -> bool:
    layer = re.search(r"layers\.(\d+)\.self_attn\.(?:k_proj|v_proj|k_norm)\.weight$", name)
    return layer is not None and int(layer[1]) in shared_layers
