"""Whether a drafter fits a target, from their configurations alone: nothing is read or allocated to find out."""

from __future__ import annotations

from collections.abc import Iterator

from gemma_mtp.config.models import DrafterConfig, TargetConfig
from gemma_mtp.config.text import SLIDING
from gemma_mtp.errors import PairError


def check_pair(target: TargetConfig, drafter: DrafterConfig) -> None:
    """Raise PairError naming the first field in which the drafter does not fit, and both values."""
    for field, of_target, of_drafter in _pairs(target, drafter):
        if of_target != of_drafter:
            raise PairError(
                f"the drafter does not fit the target: {field} is {of_drafter} in the drafter, but {of_target} in the"
                " target; use the drafter trained for this target."
            )


def pair_verdict(target: TargetConfig, drafter: DrafterConfig) -> str | None:
    """None if the pair fits, else the reason why not."""
    try:
        check_pair(target, drafter)
    except PairError as error:
        return str(error)
    return None


def _pairs(target: TargetConfig, drafter: DrafterConfig) -> Iterator[tuple[str, object, object]]:
    """Fields that must agree: name, the target's value, the drafter's."""
    t, d = target.text, drafter.text
    yield "backbone_hidden_size (the target's hidden_size)", t.hidden_size, drafter.backbone_hidden_size
    yield "vocab_size", t.vocab_size, d.vocab_size
    for layer, kind in enumerate(d.layer_types):
        donor = t.donor_layers.get(kind)
        if donor is None:
            yield f"a {kind} layer with keys and values of its own", "absent", "needed"
            return
        yield f"KV heads of {kind} layers", t.layer_kv_heads(donor), d.layer_kv_heads(layer)
        yield f"head size of {kind} layers", t.layer_head_dim(donor), d.layer_head_dim(layer)
        for field in ("rope_theta", "rope_type", "partial_rotary_factor", "factor"):
            yield f"{field} of {kind} layers", getattr(t.rope(kind), field), getattr(d.rope(kind), field)
    if SLIDING in d.layer_types:
        yield "sliding_window", t.sliding_window, d.sliding_window
