"""Which drafters fit which targets: the official pairs do, and one field that differs is enough for a refusal."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TINY, random_drafter, random_target
from oracle import FAMILIES, F, S

from gemma_mtp.checkpoint import read_drafter_config, read_target_config, save_drafter, save_target
from gemma_mtp.config import PRESETS, DrafterConfig, TargetConfig
from gemma_mtp.config.pairing import check_pair, pair_verdict
from gemma_mtp.engine.pair import load_pair
from gemma_mtp.errors import CheckpointError, PairError

Checkpoints = Callable[[str], tuple[Path, Path]]
SIZES = ["E2B", "E4B", "12B", "26B-A4B", "31B"]


def preset_pair(of_target: str, of_drafter: str) -> tuple[TargetConfig, DrafterConfig]:
    target, drafter = PRESETS[f"gemma-4-{of_target}-it"], PRESETS[f"gemma-4-{of_drafter}-it-assistant"]
    assert isinstance(target, TargetConfig) and isinstance(drafter, DrafterConfig)
    return target, drafter


def check_refused(target: TargetConfig, drafter: DrafterConfig, field: str, of_target: Any, of_drafter: Any) -> None:
    with pytest.raises(PairError) as caught:
        check_pair(target, drafter)
    message = str(caught.value)
    assert f"{field} is {of_drafter} in the drafter, but {of_target} in the target" in message
    assert "\n" not in message
    assert message.endswith(".")
    assert pair_verdict(target, drafter) == message


@pytest.mark.parametrize("size", SIZES)
def test_official_pairs_fit(size: str) -> None:
    check_pair(*preset_pair(size, size))
    assert pair_verdict(*preset_pair(size, size)) is None


@pytest.mark.parametrize(("of_target", "of_drafter"), list(itertools.permutations(SIZES, 2)))
def test_mixed_official_pairs_are_refused(of_target: str, of_drafter: str) -> None:
    target, drafter = preset_pair(of_target, of_drafter)
    field = "backbone_hidden_size (the target's hidden_size)"
    check_refused(target, drafter, field, target.text.hidden_size, drafter.backbone_hidden_size)


@pytest.mark.parametrize(("of_target", "of_drafter", "field", "values"), [
    ("E2B", "E4B", f"KV heads of {S} layers", (1, 2)),
    ("E4B", "12B", f"KV heads of {S} layers", (2, 8)),
    ("12B", "26B-A4B", f"KV heads of {F} layers", (1, 2)),
    ("26B-A4B", "31B", f"KV heads of {S} layers", (8, 16)),
])  # fmt: skip
def test_mixed_pairs_of_the_same_width_are_refused_too(
    of_target: str, of_drafter: str, field: str, values: tuple[int, int]
) -> None:
    target, drafter = preset_pair(of_target, of_drafter)
    drafter = dataclasses.replace(drafter, backbone_hidden_size=target.text.hidden_size)
    check_refused(target, drafter, field, *values)


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_of_transformers_fit(checkpoints: Checkpoints, family: str) -> None:
    target, drafter = checkpoints(family)
    check_pair(read_target_config(target), read_drafter_config(drafter))


# -- one field at a time, changed in either model


@pytest.mark.parametrize(("changes", "field", "of_text"), [
    ({"vocab_size": 131072}, "vocab_size", lambda c: c.vocab_size),
    ({"num_key_value_heads": 4}, f"KV heads of {S} layers", lambda c: c.num_key_value_heads),
    ({"num_global_key_value_heads": 8}, f"KV heads of {F} layers", lambda c: c.num_global_key_value_heads),
    ({"head_dim": 128}, f"head size of {S} layers", lambda c: c.head_dim),
    ({"global_head_dim": 256}, f"head size of {F} layers", lambda c: c.global_head_dim),
    ({"sliding_window": 512}, "sliding_window", lambda c: c.sliding_window),
    ({"sliding_rope": {"rope_theta": 2e4}}, f"rope_theta of {S} layers", lambda c: c.sliding_rope.rope_theta),
    ({"full_rope": {"rope_theta": 2e6}}, f"rope_theta of {F} layers", lambda c: c.full_rope.rope_theta),
    ({"full_rope": {"partial_rotary_factor": 0.5}}, f"partial_rotary_factor of {F} layers",
     lambda c: c.full_rope.partial_rotary_factor),
    ({"full_rope": {"rope_type": "default"}}, f"rope_type of {F} layers", lambda c: c.full_rope.rope_type),
    ({"sliding_rope": {"rope_type": "proportional"}}, f"rope_type of {S} layers", lambda c: c.sliding_rope.rope_type),
    ({"full_rope": {"factor": 8.0}}, f"factor of {F} layers", lambda c: c.full_rope.factor),
])  # fmt: skip
@pytest.mark.parametrize("changed", ["target", "drafter"])
def test_any_one_field_is_enough(changes: dict[str, Any], field: str, of_text: Any, changed: str) -> None:
    target, drafter = preset_pair("31B", "31B")
    config: Any = target if changed == "target" else drafter
    changes = {
        name: dataclasses.replace(getattr(config.text, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    other = dataclasses.replace(config, text=dataclasses.replace(config.text, **changes))
    target, drafter = (other, drafter) if changed == "target" else (target, other)
    assert of_text(target.text) != of_text(drafter.text)
    check_refused(target, drafter, field, of_text(target.text), of_text(drafter.text))


def test_backbone_hidden_size() -> None:
    target, drafter = preset_pair("31B", "31B")
    field = "backbone_hidden_size (the target's hidden_size)"
    check_refused(target, dataclasses.replace(drafter, backbone_hidden_size=1536), field, 5376, 1536)
    wider = dataclasses.replace(target, text=dataclasses.replace(target.text, hidden_size=6144))
    check_refused(wider, drafter, field, 6144, 5376)


def test_a_target_without_a_donor_of_the_layers_type() -> None:
    target, drafter = preset_pair("31B", "31B")
    full = dataclasses.replace(target.text, layer_types=(F,) * 60)
    field = f"a {S} layer with keys and values of its own"
    check_refused(dataclasses.replace(target, text=full), drafter, field, "absent", "needed")


def test_what_a_drafter_does_not_use_may_differ() -> None:
    """Sizes of its own, and the window where it has full layers only."""
    target, drafter = preset_pair("31B", "31B")
    own = dataclasses.replace(
        drafter.text, hidden_size=512, intermediate_size=77, num_hidden_layers=2, layer_types=(F, F),
        num_kv_shared_layers=2, sliding_window=8, final_logit_softcapping=5.0, eos_token_ids=(),
    )  # fmt: skip
    check_pair(target, dataclasses.replace(drafter, text=own))


# -- before any weight is read


@pytest.mark.parametrize(("changes", "field"), [
    ({"hidden_size": 40}, r"hidden_size\) is 40 in the drafter, but 32 in the target"),
    ({"sliding_window": 9}, "sliding_window is 9 in the drafter, but 8 in the target"),
    ({"num_key_value_heads": 4}, f"KV heads of {S} layers is 4 in the drafter, but 2 in the target"),
])  # fmt: skip
def test_load_pair_checks_the_fit_before_it_reads_weights(tmp_path: Path, changes: Any, field: str) -> None:
    other = dataclasses.replace(TINY, attention_k_eq_v=True, **changes)
    drafters = {"fits": random_drafter(), "other": random_drafter(other)}
    save_target(random_target(), TargetConfig(TINY), tmp_path / "target", torch.float32)
    for name, drafter in drafters.items():
        save_drafter(drafter, drafter.config, tmp_path / name, torch.float32)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(PairError, match=field):
        load_pair(tmp_path / "target", tmp_path / "other", device="cpu")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):  # what reading the weights would have said
        load_pair(tmp_path / "target", tmp_path / "fits", device="cpu")
