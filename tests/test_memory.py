"""What inspect reports, against the official figures and against files that transformers wrote."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import TINY, random_target
from oracle import build_target

from gemma_mtp import load_pair
from gemma_mtp.backend.select import kv_dtype
from gemma_mtp.checkpoint import save_target
from gemma_mtp.config import LAYER_TYPES, PRESETS, TargetConfig
from gemma_mtp.kv.blocks import BLOCK_ROWS, block_bytes, block_counts
from gemma_mtp.kv.pool import KVPool
from gemma_mtp.measure.memory import geometry, inspect_checkpoint, kv_bytes
from gemma_mtp.model.target import Target

Checkpoints = Callable[[str], tuple[Path, Path]]


@pytest.mark.parametrize("family", ["e2b", "26b", "31b", "text"])
def test_a_checkpoint_that_transformers_wrote(checkpoints: Checkpoints, family: str) -> None:
    target, drafter = map(inspect_checkpoint, checkpoints(family))
    theirs = build_target(family)
    text = [p for name, p in theirs.named_parameters() if "vision" not in name and "audio" not in name]
    scalars = [b for name, b in theirs.named_buffers() if name.endswith("layer_scalar") and "vision" not in name]
    assert target.parameters == sum(tensor.numel() for tensor in {id(t): t for t in (*text, *scalars)}.values())
    assert target.weight_bytes == 4 * target.parameters
    assert (target.kind, drafter.kind) == ("target", "drafter")
    assert drafter.kv_bytes is None
    assert "kv_bytes" not in drafter.to_dict()


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.endswith("assistant")])
def test_kv_bytes_are_what_the_cache_allocates(name: str) -> None:
    config = PRESETS[name].text
    sizes = kv_bytes(config, torch.bfloat16)
    window = config.sliding_window
    counts = [block_counts(window, length, max_rows=1) for length in (window, window + 1024)]
    pools = [KVPool(config, count, 1, torch.bfloat16, "meta") for count in counts]
    allocated = [sum(2 * rows.keys.nbytes for rows in pool.layers.values()) for pool in pools]
    assert allocated[0] == window * (sizes.per_token + sizes.sliding_per_token_until_window)
    # a window that begins within a block reaches into one more
    assert allocated[1] - allocated[0] == 1024 * sizes.per_token + BLOCK_ROWS * sizes.sliding_per_token_until_window
    assert allocated[1] == sum(count * block_bytes(config, kind, 2) for kind, count in counts[1].items())
    expected = window * sizes.sliding_per_token_until_window + config.max_position_embeddings * sizes.per_token
    assert sizes.at_max_context == expected


def test_the_31b_takes_two_bytes_times_heads_times_sizes() -> None:
    """10 full layers of 4 heads of 512, 50 sliding ones of 16 heads of 256 (FACTS), keys and values in bf16."""
    sizes = kv_bytes(PRESETS["gemma-4-31B-it"].text, torch.bfloat16)
    assert sizes.per_token == 10 * 4 * 512 * 2 * 2
    assert sizes.sliding_per_token_until_window == 50 * 16 * 256 * 2 * 2


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_kv_bytes_are_of_the_backend_that_would_run(
    stored: torch.dtype, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The native operators keep float32 whatever the weights are stored in; PyTorch's keep the weights' dtype."""
    if not native:
        monkeypatch.setattr("gemma_mtp.backend.native.native_available", lambda: False)
        monkeypatch.setattr("gemma_mtp.engine.pair.native_available", lambda: False)
    save_target(random_target(), TargetConfig(TINY), tmp_path, stored)
    sizes, backend = inspect_checkpoint(tmp_path).kv_bytes, load_pair(tmp_path).backend
    assert sizes is not None
    rows = backend.make_pool(dict.fromkeys(LAYER_TYPES, 1), 1).layers.values()
    written = sum(kept.keys.nbytes + kept.values.nbytes for kept in rows) // BLOCK_ROWS
    assert written == sizes.per_token + sizes.sliding_per_token_until_window
    assert (sizes.dtype, sizes.element_bytes) == (str(backend.kv_dtype).removeprefix("torch."), 4)
    assert kv_dtype(torch.device("cpu"), torch.float16) == torch.float16  # which the native operators do not multiply
    assert kv_dtype(torch.device("meta"), torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "billions"), [("gemma-4-E2B-it", 4.65), ("gemma-4-12B-it", 11.9), ("gemma-4-26B-A4B-it", 25.2)]
)
def test_official_parameter_counts(name: str, billions: float) -> None:
    """The text models; the hub's totals hold the vision and audio towers too."""
    config = PRESETS[name]
    assert isinstance(config, TargetConfig)
    with torch.device("meta"):
        count = sum(tensor.numel() for tensor in Target(config.text).checkpoint_tensors().values())
    assert count / 1e9 == pytest.approx(billions, rel=0.01)


def test_geometry_shows_the_layer_pattern() -> None:
    assert geometry(PRESETS["gemma-4-E2B-it"])["layers"] == "35 (4S+F x 7)"
    assert geometry(PRESETS["gemma-4-E2B-it"])["donor_layers"] == {"sliding": 13, "full": 14}
    assert geometry(PRESETS["gemma-4-31B-it-assistant"])["backbone_hidden_size"] == 5376
    assert "centroids" not in geometry(PRESETS["gemma-4-31B-it-assistant"])
