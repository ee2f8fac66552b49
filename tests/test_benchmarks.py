"""What benchmarks/ measures with: pairs that always agree, drafts that are wrong as often as asked, weight bytes."""

# mypy: disable-error-code="func-returns-value"

import dataclasses

import pairs
import pytest
import sides
import torch
from models import TINY, native_only
from ours import drafter_bytes, target_bytes, unreliable
from sides import Side, measure

from gemma_mtp import SamplingParams, load_pair
from gemma_mtp.backend.cpu import CpuBackend
from gemma_mtp.backend.native import Memory
from gemma_mtp.config import DrafterConfig
from gemma_mtp.engine.pair import Pair
from gemma_mtp.model.target import Target
from gemma_mtp.weight_types import parse_weight_types

PROMPT = [7, 3, 11]
PARAMS = SamplingParams(max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module", params=[False, True], ids=["full head", "centroid head"])
def agreeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """KV sharing, per-layer embeddings and both kinds of head, as the official checkpoints have them."""
    target = dataclasses.replace(TINY, vocab_size=64, vocab_size_per_layer_input=64, hidden_size=64)
    text = dataclasses.replace(
        target, hidden_size=32, num_hidden_layers=4, num_kv_shared_layers=4, use_double_wide_mlp=False,
        layer_types=TINY.layer_types[2:6], hidden_size_per_layer_input=0, vocab_size_per_layer_input=0,
        final_logit_softcapping=None,
    )  # fmt: skip
    drafter = DrafterConfig(
        text, 64, use_ordered_embeddings=request.param, num_centroids=8, centroid_intermediate_top_k=2
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pairs.GEOMETRIES, "tiny", lambda: pairs.Geometry(target, drafter))
        directories = pairs.written_pair("tiny", tmp_path_factory.mktemp("cache"))
        assert pairs.written_pair("tiny", directories[0].parents[1]) == directories
    return load_pair(*directories, dtype="bfloat16")


def test_the_pair_repeats_its_last_token_and_every_draft_is_accepted(agreeing: Pair) -> None:
    result = agreeing.generate(PROMPT, PARAMS, draft_tokens=3)
    assert result.token_ids == [PROMPT[-1]] * PARAMS.max_tokens
    assert result.accepted == result.drafted > 0


@pytest.mark.parametrize("acceptance", [0.0, 0.6])
def test_drafts_are_wrong_as_often_as_asked_and_the_output_stays(agreeing: Pair, acceptance: float) -> None:
    result = unreliable(agreeing, acceptance).generate(PROMPT, PARAMS, draft_tokens=2)
    assert result.token_ids == [PROMPT[-1]] * PARAMS.max_tokens
    # about 200 rounds: 0.13 is over three standard deviations, and the seed is fixed
    assert result.accepted_by_position[0] == pytest.approx(acceptance, abs=0.13)


@native_only
@pytest.mark.parametrize("kinds", [None, "int8", "int4"])
def test_counted_bytes_are_those_the_native_operators_hold(
    kinds: str | None, agreeing: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All matrices and vectors, but per-layer embeddings, of which a step reads a row; vectors are held in float32."""
    target = Target(agreeing.target.config).to(torch.bfloat16).eval().requires_grad_(False)
    if kinds is not None:
        target.quantise_(parse_weight_types(kinds))
    memories: list[Memory] = []

    class Recorded(Memory):
        def __init__(self) -> None:
            super().__init__()
            memories.append(self)

    monkeypatch.setattr("gemma_mtp.backend.cpu.Memory", Recorded)
    CpuBackend(target)
    held = {t.data_ptr(): t for memory in memories for t in memory.tensors}
    vectors = sum(t.numel() for t in target.checkpoint_tensors().values() if t.ndim == 1)
    matrices = sum(t.nbytes for t in held.values() if t.ndim == 2)
    matrices -= target.embed_tokens_per_layer.stored.nbytes
    assert target_bytes(target) == matrices + 2 * vectors
    assert agreeing.drafter is not None
    assert 0 < drafter_bytes(agreeing.drafter) < target_bytes(agreeing.target)


def test_a_floor_is_the_weights_of_a_round_over_bandwidth() -> None:
    side = Side("drafted", lambda prompt: prompt, rounds=[(4, 5), (4, 3)], step_bytes=(1000, 50))
    assert side.floor(2400.0) == pytest.approx(2400 / 1200 * 4)


def test_sides_are_measured_in_turn_beginning_with_another_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "TURN_SECONDS", 0.0)
    order: list[str] = []

    def side(name: str) -> Side:
        return Side(name, lambda prompt: order.append(name) or prompt)

    both = [side(name) for name in "ab"]
    measure(both, [[1, 2]], repeats=2)
    assert "".join(order) == "ab" + "ab" + "ba"
    assert all(len(side.speeds) == 2 and side.outputs == [[1, 2]] for side in both)


def test_another_seed_spoils_other_drafts(agreeing: Pair) -> None:
    first, second = (unreliable(agreeing, 0.5, seed).generate(PROMPT, PARAMS, draft_tokens=2).rounds for seed in (0, 1))
    assert first != second


def test_large_matrices_repeat_a_block_out_of_step_with_their_rows() -> None:
    tiled = pairs._tiled(torch.arange(7.0), torch.Size((4, 5)))
    assert torch.equal(tiled.flatten(), torch.arange(20.0) % 7)
    assert len({tuple(row) for row in tiled.tolist()}) == 4
