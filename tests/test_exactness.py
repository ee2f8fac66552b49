"""The promise of the whole: the same tokens drafted and plain, whatever else is drawn."""

import random

import pytest

from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.engine import pair as engine
from gemma_mtp.engine.pair import Pair, bundled_directory, load_pair
from gemma_mtp.ops.native import module, set_threads
from gemma_mtp.training.evaluate import read_prompts

PROMPTS = [text for _, text in read_prompts(bundled_directory() / "heldout_prompts.jsonl")]


#: dtypes, and what is quantised of bfloat16 weights; the last mixes dense and quantised matrices in both models
WEIGHTS = {"float32": None, "bfloat16": None, "int8": "int8", "int4": "int4",
           "mixed": "target=int8,embeddings=int4,drafter-head=int8"}  # fmt: skip


@pytest.fixture(scope="module")
def pairs() -> dict[str, Pair]:
    return {
        name: load_pair(dtype=name if kinds is None else "bfloat16", quantize=kinds) for name, kinds in WEIGHTS.items()
    }


@pytest.mark.skipif(module() is None, reason="the native operators were not built")
@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_generations_drawn_at_random(pairs: dict[str, Pair], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides with their own threads and prefill chunks; every weight type and draft length, verification exact."""
    rng, mismatches, accepted = random.Random(count), [], dict.fromkeys(WEIGHTS, 0)
    threads = module().threads()

    def generate(pair: Pair, prompt: list[int], params: SamplingParams, drafts: int | str):
        monkeypatch.setattr(engine, "PREFILL_CHUNK_ROWS", rng.randint(1, 64))
        set_threads(rng.randint(1, 3))
        return pair.generate(prompt, params, draft_tokens=drafts)  # type: ignore[arg-type]

    try:
        for i in range(count):
            weights = rng.choice(sorted(pairs))
            pair = pairs[weights]
            ids = pair.encode(rng.choice(PROMPTS))
            start = rng.randrange(len(ids) - 1)
            prompt = ids[start : start + rng.randint(1, 160)]
            params = SamplingParams(
                max_tokens=rng.randint(2, 24), temperature=rng.choice([0.0, rng.uniform(0, 1.5)]),
                top_k=rng.choice([0, 0, 20]), top_p=rng.choice([1.0, 0.9]), seed=rng.getrandbits(60), ignore_eos=True,
            )  # fmt: skip
            plain = generate(pair, prompt, params, 0)
            drafted = generate(pair, prompt, params, rng.choice([1, 2, 3, 4, 5, 6, 7, 8, "auto"]))
            accepted[weights] += drafted.accepted
            if plain.token_ids != drafted.token_ids:
                mismatches.append((i, weights, params, prompt))
    finally:
        set_threads(threads)
    assert mismatches == []
    assert min(accepted.values()) > count / 10
    assert sum(accepted.values()) > count
