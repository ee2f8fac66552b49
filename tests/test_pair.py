"""The Python API: one call in, tokens, text and statistics out; stop conditions at the exact token."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, VOCAB, agreeing_pair, letters, random_drafter, random_target, save_pair

from gemma_mtp import checkpoint
from gemma_mtp.backend.select import make_backend
from gemma_mtp.checkpoint import save_drafter
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair, load_pair
from gemma_mtp.errors import CheckpointError, PairError, PromptError, SamplingError, TokenizerError

PROMPT = [9, 8, 7]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(
        make_backend(*agreeing_pair(3)),
        letters(tmp_path_factory.mktemp("tokenizer")),
        GenerationDefaults(eos_token_ids=()),
    )


@pytest.fixture(scope="module")
def raw_pair(pair: Pair) -> Pair:
    return dataclasses.replace(pair, tokenizer=None)


@given(st.integers(0, 8), st.integers(1, 40), st.sampled_from([0.0, 1.0]))
@settings(max_examples=40)
def test_max_tokens_is_met_and_never_exceeded(raw_pair: Pair, draft_tokens: int, max_tokens: int, temp: float) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=temp)
    result = raw_pair.generate(PROMPT, params, draft_tokens=draft_tokens)
    assert len(result.token_ids) == max_tokens
    assert result.finish_reason == "length"
    assert sum(r.committed for r in result.rounds) == max_tokens
    assert all(r.committed <= r.accepted + 1 <= r.drafted + 1 for r in result.rounds)
    assert all(r.drafted <= draft_tokens for r in result.rounds)


@pytest.fixture(scope="module")
def plain_outputs(raw_pair: Pair) -> dict[float, list[int]]:
    """By temperature."""
    return {temp: raw_pair.generate(PROMPT, SamplingParams(max_tokens=60, temperature=temp), draft_tokens=0).token_ids
            for temp in (0.0, 0.7)}  # fmt: skip


@given(st.integers(0, 8), st.integers(0, 59), st.sampled_from([0.0, 0.7]))
@settings(max_examples=60)
def test_a_stop_token_ends_the_output_exactly(
    raw_pair: Pair, plain_outputs: dict[float, list[int]], draft_tokens: int, at: int, temp: float
) -> None:
    params, plain = SamplingParams(max_tokens=60, temperature=temp), plain_outputs[temp]
    stop = plain[at]
    stopping = dataclasses.replace(params, stop_token_ids=(stop,))
    result = raw_pair.generate(PROMPT, stopping, draft_tokens=draft_tokens)
    assert result.token_ids == plain[: plain.index(stop) + 1]
    assert result.finish_reason == "stop"


def test_eos_ends_the_output_unless_ignored(raw_pair: Pair) -> None:
    plain = raw_pair.generate(PROMPT, SamplingParams(max_tokens=30)).token_ids
    with_eos = dataclasses.replace(raw_pair, generation=GenerationDefaults(eos_token_ids=(plain[4],)))
    ended = with_eos.generate(PROMPT, SamplingParams(max_tokens=30))
    assert ended.token_ids == plain[: plain.index(plain[4]) + 1] and ended.finish_reason == "stop"
    assert with_eos.generate(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True)).token_ids == plain


DRAWN = SamplingParams(max_tokens=60, temperature=1.0, seed=4)


@pytest.fixture(scope="module")
def drawn_text(pair: Pair) -> str:
    text = pair.generate(PROMPT, DRAWN, draft_tokens=0).text
    assert text is not None
    return text


@given(st.integers(0, 8), st.integers(0, 50), st.integers(1, 4))
@settings(max_examples=60)
def test_a_stop_string_ends_the_output_exactly(
    pair: Pair, drawn_text: str, draft_tokens: int, start: int, length: int
) -> None:
    text, stop = drawn_text, drawn_text[start : start + length]
    result = pair.generate(PROMPT, dataclasses.replace(DRAWN, stop=stop), draft_tokens=draft_tokens)
    assert result.text == text[: text.index(stop)]
    assert len(result.token_ids) == text.index(stop) + length, "the token that completes the stop string is the last"
    assert result.finish_reason == "stop"


@pytest.mark.parametrize("draft_tokens", [0, 1, 4, 8])
def test_stream_gives_the_text_piece_by_piece(pair: Pair, draft_tokens: int) -> None:
    params = SamplingParams(max_tokens=50, stop=("@@@@",))
    stream = pair.stream(PROMPT, params, draft_tokens=draft_tokens)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        assert "".join(pieces) == stream.result.text, "the result grows with it"
    assert "".join(pieces) == pair.generate(PROMPT, params).text
    assert len(pieces) > 1 and all(pieces)


def test_logprobs_are_the_same_drafted_and_plain(raw_pair: Pair) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=2, logprobs=3)
    plain, drafted = (raw_pair.generate(PROMPT, params, draft_tokens=k).logprobs for k in (0, 5))
    assert plain is not None and drafted is not None and len(plain) == len(drafted) == 40
    for a, b in zip(plain, drafted, strict=True):
        assert a.token_id == b.token_id and len(a.top) == len(b.top) == 3
        assert math.isclose(a.logprob, b.logprob, abs_tol=1e-4)
        assert [i for i, _ in a.top] == [i for i, _ in b.top]
        assert a.logprob <= a.top[0][1] + 1e-6 and math.exp(a.top[0][1]) <= 1


def test_statistics_add_up(raw_pair: Pair) -> None:
    result = raw_pair.generate(PROMPT, SamplingParams(max_tokens=80), draft_tokens=3)
    assert result.drafted == sum(r.drafted for r in result.rounds)
    assert len(result.token_ids) == 1 + len(result.decode_rounds) + result.accepted
    assert result.mean_acceptance_length == pytest.approx(79 / len(result.decode_rounds))
    first = sum(r.accepted >= 1 for r in result.decode_rounds) / sum(r.drafted >= 1 for r in result.decode_rounds)
    assert result.accepted_by_position[0] == pytest.approx(first) and len(result.accepted_by_position) == 3
    assert result.prefill_seconds > 0 and result.decode_seconds > 0 and result.tokens_per_second > 0


def test_the_context_ends_at_max_position_embeddings() -> None:
    config = dataclasses.replace(TINY, max_position_embeddings=40)
    short = Pair(
        make_backend(random_target(0, config), random_drafter(config)), None, GenerationDefaults(eos_token_ids=())
    )
    result = short.generate([1] * 30, SamplingParams(max_tokens=500), draft_tokens=4)
    assert len(result.token_ids) == 10 and result.finish_reason == "length"
    assert short.generate([1] * 39, SamplingParams(max_tokens=5)).finish_reason == "length"
    with pytest.raises(PromptError, match="has 40 tokens, but the target takes at most 39"):
        short.generate([1] * 40)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "prompt is empty"), ([1, VOCAB], f"token id {VOCAB}"), ([-1], "token id -1"), ([1.5], "token id 1.5")],
)
def test_bad_prompts(raw_pair: Pair, prompt: list[int], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        raw_pair.generate(prompt)


def test_bad_parameters(raw_pair: Pair) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer"):
        raw_pair.generate("text")
    with pytest.raises(TokenizerError, match="stop strings need a tokenizer"):
        raw_pair.generate(PROMPT, SamplingParams(stop="x"))
    with pytest.raises(SamplingError, match="stop_token_ids has token id 999"):
        raw_pair.generate(PROMPT, SamplingParams(stop_token_ids=(999,)))
    with pytest.raises(SamplingError, match="draft_tokens is -1"):
        raw_pair.generate(PROMPT, draft_tokens=-1)
    with pytest.raises(SamplingError, match="draft_tokens is 256"):
        raw_pair.generate(PROMPT, draft_tokens=256)
    with pytest.raises(SamplingError, match="verification is 'loose'"):
        raw_pair.generate(PROMPT, verification="loose")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    save_pair(root, *agreeing_pair(3))
    return root


def test_load_pair(saved: Path, raw_pair: Pair) -> None:
    params = SamplingParams(max_tokens=40)
    loaded = load_pair(saved / "target", saved / "drafter")
    assert loaded.tokenizer is None and loaded.target.embed_tokens.dtype == torch.float32
    assert loaded.generate(PROMPT, params).token_ids == raw_pair.generate(PROMPT, params).token_ids
    assert loaded.generate(PROMPT, params, draft_tokens=4).accepted > 0
    alone = load_pair(saved / "target", dtype="bfloat16")
    assert alone.drafter is None and alone.target.embed_tokens.dtype == torch.bfloat16
    assert alone.generate(PROMPT, params).draft_tokens == 0
    assert load_pair(saved / "target", saved / "drafter", use_drafter=False).drafter is None


def test_loading_tells_the_bytes_of_each_model(saved: Path) -> None:
    told: list[tuple[str, int, int]] = []
    load_pair(saved / "target", saved / "drafter", on_bytes=lambda *given: told.append(given))
    for part in ("target", "drafter"):
        done = [count for name, count, _ in told if name == part]
        size = sum(header.nbytes for header in checkpoint.text_headers(saved / part).values())
        assert done == sorted(done) and done[-1] == size and len(done) > 4
        assert {of for name, _, of in told if name == part} == {size}


def test_the_repr_says_what_is_loaded(pair: Pair, raw_pair: Pair) -> None:
    target, drafter = (f"{sum(w.numel() for w in model.checkpoint_tensors().values()) / 1e6:.1f}M"
                       for model in (pair.target, pair.drafter) if model is not None)  # fmt: skip
    assert repr(pair) == f"<Pair target={target} drafter={drafter} on cpu, with tokenizer>"
    assert repr(raw_pair) == f"<Pair target={target} drafter={drafter} on cpu, without tokenizer>"
    assert repr(pair.with_drafter(None)) == f"<Pair target={target} on cpu, with tokenizer>"


def test_load_pair_refuses(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="dtype 'int4' is not known"):
        load_pair(saved / "target", dtype="int4")
    with pytest.raises(CheckpointError, match="device 'abacus' is not known"):
        load_pair(saved / "target", device="abacus")
    other = random_drafter(dataclasses.replace(TINY, hidden_size=40))
    save_drafter(other, other.config, tmp_path, torch.float32)
    with pytest.raises(PairError, match=r"hidden_size\) is 40 in the drafter, but 32 in the target"):
        load_pair(saved / "target", tmp_path)
