"""Log-probabilities of prompts: transformers' own in float64, whatever runs beside them, whatever was read before."""

import copy
from pathlib import Path

import pytest
import torch
from models import backends
from oracle import VOCAB, build_target

from gemma_mtp import checkpoint
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.sampling import ranks
from gemma_mtp.engine.engine import Engine
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.request import Generation, Request
from gemma_mtp.engine.result import PromptLogprob
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.errors import SamplingError

SCORE = SamplingParams(max_tokens=0, prompt_logprobs=3)


def played(engine: Engine, requests: list[Request]) -> list[Generation]:
    generations = [engine.submit(request) for request in requests]
    while not engine.idle:
        engine.step()
    return generations


def prompt_of(pair: Pair, length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, pair.target.config.vocab_size, (length,), generator=generator).tolist()


@pytest.mark.parametrize("name", ["reference", "native"])
def test_they_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    theirs = build_target("text")
    theirs.save_pretrained(tmp_path)
    backend = backends(checkpoint.load_target(tmp_path, torch.float32)).get(name)
    if backend is None:
        pytest.skip("this machine has no such backend")
    pair = Pair(backend=backend, tokenizer=None, generation=GenerationDefaults(eos_token_ids=()))
    prompt = prompt_of(pair, 90)
    with torch.no_grad():
        logits = copy.deepcopy(theirs).double()(torch.tensor([prompt])).logits[0, :-1, :VOCAB]
    expected = logits.log_softmax(-1)
    scores = pair.generate(prompt, SCORE).prompt_logprobs
    assert scores is not None and [entry.token_id for entry in scores] == prompt[1:]
    for entry, row in zip(scores, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=2e-4)
        top = row.topk(3)
        assert [token_id for token_id, _ in entry.top] == top.indices.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(top.values.tolist(), abs=2e-4)
        assert entry.rank == 1 + int((row > row[entry.token_id]).sum())


def test_a_rank_counts_lower_ids_among_equals() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert [int(ranks(logits, torch.tensor([i]))) for i in range(4)] == [2, 1, 3, 4]


def test_nothing_is_generated_and_generating_changes_no_score(pair: Pair) -> None:
    prompt = prompt_of(pair, 40)
    alone = pair.generate(prompt, SCORE)
    assert (alone.token_ids, alone.finish_reason, alone.text) == ([], "length", "")
    both = pair.generate(prompt, SamplingParams(max_tokens=9, prompt_logprobs=3), draft_tokens=3)
    assert both.prompt_logprobs == alone.prompt_logprobs
    assert both.token_ids == pair.generate(prompt, SamplingParams(max_tokens=9)).token_ids
    assert pair.generate(prompt[:1], SCORE).prompt_logprobs == []
    with pytest.raises(SamplingError, match="max_tokens is 0"):
        SamplingParams(max_tokens=0)


def scores_of(generation: Generation) -> list[PromptLogprob]:
    assert generation.result.prompt_logprobs is not None
    return generation.result.prompt_logprobs


def test_a_scored_prompt_takes_nothing_from_earlier_ones_and_leaves_them_all(pair: Pair) -> None:
    prompt = prompt_of(pair, 150)
    engine = Engine(pair, EngineSettings(max_tokens=256))
    expected = pair.generate(prompt, SCORE).prompt_logprobs
    played(engine, [Request(prompt, SamplingParams(max_tokens=2))])
    (scored,) = played(engine, [Request(prompt, SCORE)])
    assert (scores_of(scored), scored.cached_tokens) == (expected, 0)
    (after,) = played(engine, [Request(prompt, SamplingParams(max_tokens=2))])
    assert after.cached_tokens > 0


def test_scores_among_others_and_after_preemptions(pair: Pair) -> None:
    """Chunks of a prompt are read beside the rounds of others, and a pool that is too small makes them read twice."""
    prompts = [prompt_of(pair, length, seed) for seed, length in enumerate((200, 70, 130, 1, 2, 190))]
    params = SamplingParams(max_tokens=40, prompt_logprobs=3, ignore_eos=True)
    engine = Engine(pair, EngineSettings(max_tokens=256, max_running=6, kv_memory_mb=1.8))
    generations = played(engine, [Request(prompt, params, draft_tokens=2) for prompt in prompts])
    for prompt, generation in zip(prompts, generations, strict=True):
        alone = pair.generate(prompt, params, draft_tokens=0)
        assert scores_of(generation) == alone.prompt_logprobs
        assert generation.result.token_ids == alone.token_ids
    assert engine.stats().preemptions > 0
