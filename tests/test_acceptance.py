"""Acceptance in the engine: what is counted, the paired comparison, and what drafting gains."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from models import agreeing_pair, random_drafter, random_target

from gemma_mtp.backend.select import make_backend
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.datasets import Example, read_examples
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.round_costs import RoundCosts
from gemma_mtp.engine.pair import Pair, bundled_directory, load_pair
from gemma_mtp.engine.result import GenerationResult, RoundStats
from gemma_mtp.errors import DataError, SamplingError, TokenizerError
from gemma_mtp.measure.acceptance import (
    GREEDY,
    Acceptance,
    AcceptanceReport,
    Prompt,
    PromptAcceptance,
    compare,
    measure_acceptance,
    prompts_of,
)
from gemma_mtp.measure.speedup import best, break_even, measure_speedup, predict

PROMPTS = [Prompt(f"p{i}", [3 + i, 9, 8, 7], "odd" if i % 2 else "even") for i in range(6)]
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(make_backend(*agreeing_pair(3)), None, GenerationDefaults(()))


@pytest.fixture(scope="module")
def stranger() -> Pair:
    """The same target with a drafter that knows nothing."""
    return Pair(make_backend(agreeing_pair(3)[0], random_drafter(seed=9)), None, GenerationDefaults(()))


def played(*rounds: tuple[int, int, int]) -> GenerationResult:
    result = GenerationResult([1], 3, "exact")
    result.rounds = [RoundStats(0, 0, 1), *(RoundStats(*round_) for round_ in rounds)]
    return result


def test_the_histogram_holds_whole_rounds_only() -> None:
    first = played((3, 3, 4), (3, 0, 1), (3, 1, 2), (2, 2, 3), (1, 0, 1), (0, 0, 1))
    second = played((3, 3, 4), (3, 2, 2))  # the last one ended by a stop token at its second draft
    acceptance = Acceptance.of([first, second], 3)
    assert acceptance.histogram == (1, 1, 1, 2)
    assert acceptance == Acceptance.of([first], 3) + Acceptance.of([second], 3)


def test_all_figures_follow_from_the_histogram() -> None:
    acceptance = Acceptance((4, 3, 2, 1))
    assert acceptance.rounds == 10 and acceptance.accepted == 3 + 4 + 3
    assert acceptance.joint_by_position == pytest.approx([0.6, 0.3, 0.1])
    assert acceptance.by_position == pytest.approx([6 / 10, 3 / 6, 1 / 3])
    assert np.cumprod(acceptance.by_position) == pytest.approx(acceptance.joint_by_position)
    assert acceptance.mean_accepted == 1.0 and acceptance.mean_length == 2.0
    assert acceptance.mean_length == pytest.approx(1 + sum(acceptance.joint_by_position))
    content = acceptance.to_dict()
    assert content["acceptance_histogram"] == {"0": 4, "1": 3, "2": 2, "3": 1}
    assert content["acceptance_length_histogram"] == {"1": 4, "2": 3, "3": 2, "4": 1}
    # the identities that hold of vLLM's and SGLang's own reports
    assert content["num_draft_tokens"] == content["num_spec_steps"] * content["num_spec_tokens"]
    assert content["mean_acceptance_length"] == 1 + content["num_accepted_draft_tokens"] / content["num_spec_steps"]
    assert sum(int(n) * rounds for n, rounds in content["acceptance_histogram"].items()) == acceptance.accepted
    empty = Acceptance((0, 0, 0))
    assert (empty.mean_length, empty.by_position) == (0.0, [0.0, 0.0])
    json.dumps(empty.to_dict())


def test_measuring_counts_what_the_engine_reports(pair: Pair) -> None:
    report = measure_acceptance(pair, PROMPTS, 3, PARAMS)
    results = [pair.generate(prompt.content, PARAMS, draft_tokens=3) for prompt in PROMPTS]
    counted = [r for result in results for r in result.decode_rounds if r.drafted == 3]
    assert report.pooled.rounds == len(counted) and report.pooled.accepted == sum(r.accepted for r in counted)
    assert 0 < report.pooled.accepted < 3 * len(counted)
    assert report.tokens == 6 * 40
    assert report.by_task["even"] + report.by_task["odd"] == report.pooled
    assert list(report.by_task) == ["even", "odd"]
    content = json.loads(json.dumps(report.to_dict()))
    assert [p["name"] for p in content["prompts"]] == [p.name for p in PROMPTS]
    assert content["mean_acceptance_length"] == report.pooled.mean_length


def test_sampled_prompts_do_not_share_their_noise_and_seeds_are_kept(pair: Pair) -> None:
    same = [Prompt("a", [5, 6, 7]), Prompt("b", [5, 6, 7])]
    sampled = replace(PARAMS, temperature=1.5, seed=4)
    first, second = (measure_acceptance(pair, same, 3, sampled) for _ in range(2))
    assert first == second
    assert first.prompts[0].acceptance != first.prompts[1].acceptance
    alone = measure_acceptance(pair, same[1:], 3, replace(sampled, seed=5))
    assert alone.prompts[0] == first.prompts[1]


def test_a_drafter_that_knows_nothing_is_seen_and_the_interval_says_so(pair: Pair, stranger: Pair) -> None:
    good, bad = (measure_acceptance(p, PROMPTS, 3, PARAMS) for p in (pair, stranger))
    worse = compare(good, bad)
    assert worse.high < 0 and worse.low <= worse.difference <= worse.high
    better = compare(bad, good)
    assert better.difference == -worse.difference and better.low == pytest.approx(-worse.high)
    unchanged = compare(good, good)
    assert (unchanged.low, unchanged.difference, unchanged.high) == (0, 0, 0)
    assert "6 prompts" in str(worse)
    assert compare(good, bad) == worse  # the bootstrap's seed is fixed
    with pytest.raises(ValueError, match="the same prompts"):
        compare(good, measure_acceptance(stranger, PROMPTS[1:], 3, PARAMS))


def synthetic(rng: np.random.Generator, chances: np.ndarray, rounds: int = 30) -> AcceptanceReport:
    """Prompts with one draft a round, accepted with a chance of the prompt's own."""
    prompts = []
    for i, chance in enumerate(chances):
        hits = int(rng.binomial(rounds, chance))
        prompts.append(PromptAcceptance(str(i), "", 1, rounds, Acceptance((rounds - hits, hits))))
    return AcceptanceReport(1, PARAMS, "exact", tuple(prompts))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Nominal 95% over 40 prompts that differ much; 200 experiments. The percentile bootstrap runs a little short:
    at a true coverage of 93%, fewer than 172 hits happen with a chance below 1e-3. Unpaired draws, the negative
    control, give an interval far too wide: it covers always, and would not see a loss of 0.05."""
    rng = np.random.default_rng(0)
    covered, seen = 0, 0
    for _ in range(200):
        chances = rng.uniform(0.2, 0.8, 40)
        result = compare(synthetic(rng, chances), synthetic(rng, chances - 0.1), resamples=500)
        covered += result.low <= -0.1 <= result.high
        seen += result.high < 0
    assert covered >= 172
    assert seen >= 190
    before, after = (synthetic(rng, rng.permutation(np.linspace(0.05, 0.95, 40))) for _ in range(2))
    unpaired = compare(before, after, resamples=500)
    assert unpaired.high - unpaired.low > 2 * (result.high - result.low)


def test_too_little_to_play_a_whole_round_is_refused(pair: Pair) -> None:
    with pytest.raises(SamplingError, match="max_tokens is 4, but must be at least 5"):
        measure_acceptance(pair, PROMPTS, 3, replace(PARAMS, max_tokens=4))
    with pytest.raises(SamplingError, match="draft_tokens is 0"):
        measure_acceptance(pair, PROMPTS, 0, PARAMS)
    assert measure_acceptance(pair, PROMPTS, 3, replace(PARAMS, max_tokens=5)).pooled.rounds == 6


def test_prediction_weighs_expected_tokens_against_measured_costs() -> None:
    acceptance = Acceptance((25, 25, 50))  # 0.75, then 2/3
    costs = RoundCosts({0: 1.0, 1: 1.25, 2: 2.0, 3: 2.5, 4: 4.0})
    predictions = predict(acceptance, costs)
    assert [p.draft_tokens for p in predictions] == list(range(9))
    predictions = predictions[:5]
    assert [p.cost for p in predictions] == [1.0, 1.25, 2.0, 2.5, 4.0]
    lengths = [1, 1.75, 2.25, 2.25 + 1 / 3, 2.25 + 1 / 3 + 2 / 9]
    assert [p.expected_length for p in predictions] == pytest.approx(lengths)
    assert predictions[2].expected_length == pytest.approx(acceptance.mean_length)
    assert [p.speedup for p in predictions] == pytest.approx([x / p.cost for x, p in zip(lengths, predictions)])  # noqa: B905
    assert [p.extrapolated for p in predictions] == [False, False, False, True, True]
    assert best(predictions).draft_tokens == 1
    assert break_even(predictions) == 3
    hopeless = predict(Acceptance((100, 0, 0)), costs)
    assert break_even(hopeless) == 0 and best(hopeless).draft_tokens == 0


def test_measured_speedup_times_both_sides_of_every_prompt(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the clock replaced: a second for a plain round, two for a drafted one."""
    real = Pair.generate

    def timed(self: Pair, prompt, params=None, *, draft_tokens, verification):  # type: ignore[no-untyped-def]
        result = real(self, prompt, params, draft_tokens=draft_tokens, verification=verification)
        result.decode_seconds = len(result.decode_rounds) * (2.0 if draft_tokens else 1.0)
        return result

    monkeypatch.setattr(Pair, "generate", timed)
    speed = measure_speedup(pair, PROMPTS, 3, PARAMS, repeats=2)
    rounds = [len(real(pair, p.content, PARAMS, draft_tokens=3).decode_rounds) for p in PROMPTS]
    assert speed.plain_tokens_per_second == 1.0
    assert speed.ratio == speed.drafted_tokens_per_second == pytest.approx(6 * 39 / (2 * sum(rounds)))


def test_examples_become_prompts_of_the_pair() -> None:
    pair = load_pair()
    assert pair.tokenizer is not None
    held_out = list(read_examples(bundled_directory() / "heldout_prompts.jsonl"))
    prompts = prompts_of(pair, held_out)
    assert [p.content for p in prompts] == [pair.encode(str(e.content)) for e in held_out]  # short: taken whole
    long = Example("text", "x = 1\n" * 4000, "long.py", "t")
    request = Example("prompt", "y = 2\n" * 300, "r:1", "t")
    short, whole = prompts_of(pair, [long, request], prompt_tokens=64)
    assert len(short.content) <= 64 and (short.name, short.task) == ("long.py", "t")
    assert whole.content == pair.encode(request.render(pair.tokenizer))
    with pytest.raises(DataError, match=r"long:3 has .* tokens, but at most 2047"):
        prompts_of(pair, [replace(request, content=str(long.content), origin="long:3")])
    with pytest.raises(TokenizerError, match="a data set needs a tokenizer"):
        prompts_of(Pair(make_backend(random_target()), None, GenerationDefaults(())), held_out)
    report = measure_acceptance(pair, prompts[:2], params=replace(GREEDY, max_tokens=24))
    assert report.pooled.mean_length > 1.5
