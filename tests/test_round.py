"""`exact` verification equals plain decoding, token for token, whatever the drafter."""

from collections.abc import Sequence as Items
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    VOCAB,
    Played,
    agreeing_pair,
    backends,
    open_caches,
    play,
    play_rounds,
    random_drafter,
    random_target,
    slow_decode,
)

from gemma_mtp.backend.base import Backend, DraftedTokens, DraftRows, DraftStep
from gemma_mtp.backend.reference import ReferenceBackend
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.verify import VERIFICATIONS, Verification
from gemma_mtp.engine import draft as draft_module
from gemma_mtp.engine.draft import draft_noise
from gemma_mtp.engine.round import prefill
from gemma_mtp.engine.sequence import Turn, open_sequence
from gemma_mtp.kv.pool import KVCache
from gemma_mtp.model.target import Target

MODELS = {
    "random": (random_target(), random_drafter()),
    "centroids": (random_target(3), random_drafter(seed=4, centroids=True)),
    "agreeing": agreeing_pair(0),
    "agreeing often": agreeing_pair(3),
}
PAIRS: dict[str, Backend] = {
    f"{name}, {kind}": backend for name, pair in MODELS.items() for kind, backend in backends(*pair).items()
}
OFTEN = [name for name in PAIRS if name.startswith("agreeing often")]


class AlwaysWrong(ReferenceBackend):
    """A hostile drafter: it knows the target's output and always proposes something else."""

    def __init__(self, target: Target, prompt_length: int, plain: list[int]) -> None:
        super().__init__(target, random_drafter())
        self.prompt_length, self.plain = prompt_length, plain

    def draft(self, calls: Items[DraftRows]) -> list[DraftedTokens]:
        return [DraftedTokens([self.wrong(call.cache, step) for step in range(call.most)], []) for call in calls]

    def draft_step(self, caches: Items[KVCache], token_ids_R: torch.Tensor, hidden_RD: torch.Tensor) -> DraftStep:
        """What is projected is the number of the next step."""
        steps = [
            0 if torch.equal(hidden_D, cache.state) else int(hidden_D[0])
            for cache, hidden_D in zip(caches, hidden_RD, strict=True)
        ]
        wrong = [[self.wrong(cache, step)] for cache, step in zip(caches, steps, strict=True)]
        projected_RD = torch.tensor(steps)[:, None].add(1).float().expand_as(hidden_RD)
        return DraftStep(torch.zeros(len(steps), 1), torch.tensor(wrong), projected_RD)

    def wrong(self, cache: KVCache, step: int) -> int:
        next_token = cache.table.length + 1 - self.prompt_length + step  # of the output
        return (self.plain[min(next_token, len(self.plain) - 1)] + 1) % VOCAB


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)
parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 5, 40]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    logit_bias=st.sampled_from([{}, {3: 2.5, 7: float("-inf")}]),
    seed=st.integers(0, 2**63 - 1),
    max_tokens=st.sampled_from([1, 2, 20, 40]),
)


@given(st.sampled_from(sorted(PAIRS)), prompts, parameters, st.integers(1, 8))
@settings(max_examples=30)
def test_drafted_equals_plain(name: str, prompt: list[int], params: SamplingParams, draft_tokens: int) -> None:
    plain = play(PAIRS[name], prompt, params, 0)
    drafted = play(PAIRS[name], prompt, params, draft_tokens)
    assert drafted.tokens == plain.tokens
    assert len(plain.tokens) == params.max_tokens


@given(st.sampled_from([name for name in PAIRS if "agreeing," in name]), prompts, parameters, st.integers(0, 8))
@settings(max_examples=15)
def test_rounds_equal_the_slow_reference(
    name: str, prompt: list[int], params: SamplingParams, draft_tokens: int
) -> None:
    played = play(PAIRS[name], prompt, params, draft_tokens, chunk_rows=9)
    assert played.tokens == slow_decode(PAIRS[name].target, prompt, params, params.max_tokens)


@pytest.mark.parametrize(
    ("draft_tokens", "options"),
    [(5, {}), (5, {"temperature": 1.0}), (5, {"temperature": 1.0, "top_k": 20}), (1, {}), (8, {"temperature": 1.0})],
)
def test_an_always_wrong_drafter_changes_nothing(draft_tokens: int, options: dict[str, float]) -> None:
    """Whether it drafts at once or step by step."""
    target, prompt = random_target(5), [4, 8, 15, 16, 23, 42]
    params = SamplingParams(max_tokens=20, seed=9, **options)  # type: ignore[arg-type]
    plain = play(ReferenceBackend(target), prompt, params, 0)
    drafted = play(AlwaysWrong(target, len(prompt), plain.tokens), prompt, params, draft_tokens)
    assert drafted.tokens == plain.tokens
    assert sum(drafted.accepted) == 0 and sum(drafted.drafted) > 0


@pytest.mark.parametrize("name", OFTEN)
def test_drafts_past_the_window_are_accepted_too(name: str) -> None:
    """The agreeing pair accepts well beyond several windows, so the property above covers accepted blocks."""
    played = play(PAIRS[name], [1, 2, 3], SamplingParams(max_tokens=80), 4)
    assert sum(played.accepted) > 0.3 * sum(played.drafted)


@pytest.mark.parametrize("name", OFTEN)
def test_a_round_ends_with_the_state_that_produced_its_last_token(name: str) -> None:
    """The next round's drafts begin with it; no output shows whether it is the right one."""
    states: list[dict[int, torch.Tensor]] = [{}, {}]
    for found, drafts in zip(states, (0, 4), strict=True):

        def keep(sequence: Any, found: dict[int, torch.Tensor] = found) -> None:
            found[sequence.length] = sequence.cache.state.clone()

        played = play(PAIRS[name], [1, 2, 3], SamplingParams(max_tokens=50), drafts, after_round=keep)
    assert sum(played.accepted) > 10
    plain, drafted = states
    for length, state in drafted.items():
        assert torch.equal(state, plain[length])


def test_coupled_drafts_agree_more_than_independent_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafting with the target's own noise is what makes `exact` accept at temperature 1 (Gumbel coupling)."""
    # a min-p that removes nothing has drafts chosen outside of the backend
    backend = list(backends(*MODELS["agreeing"]).values())[-1]  # the fastest
    params = {"max_tokens": 60, "temperature": 1.0, "min_p": 1e-30}

    def accepted() -> float:
        runs = [play(backend, [5, 6], SamplingParams(seed=seed, **params), 1) for seed in range(6)]  # type: ignore[arg-type]
        return sum(sum(r.accepted) for r in runs) / sum(sum(r.drafted) for r in runs)

    coupled = accepted()
    monkeypatch.setattr(draft_module, "draft_noise", lambda coupled, *rest: draft_noise(False, *rest))
    assert coupled > 2 * accepted()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "agreeing, reference"))
     for name in PAIRS if not name.startswith("random")],
)  # fmt: skip
def test_sequences_of_a_round_go_on_as_each_would_alone(name: str) -> None:
    """Not their tokens only, which a wrong state would leave as they are, but the drafts made from it."""
    backend, count = PAIRS[name], 40 if name.endswith("native") else 15
    ways: list[tuple[dict[str, Any], int]] = [
        ({}, 4),
        ({"temperature": 0.7}, 2),
        ({"temperature": 0.9, "top_k": 20}, 5),
        ({}, 0),
        ({"logprobs": 1}, 3),
    ]
    wanted = [(SamplingParams(max_tokens=count, seed=9, **options), drafts) for options, drafts in ways]
    prompts = [[5 + i, 6, 7][: 1 + i % 3] for i in range(len(wanted))]
    alone = [play(backend, prompt, *own) for prompt, own in zip(prompts, wanted, strict=True)]
    played = []
    for cache, prompt, (params, _) in zip(open_caches(backend, len(ways), 60), prompts, wanted, strict=True):
        sequence = open_sequence(backend, cache, params, prompt)
        played.append(Played(list(prefill(backend, sequence, prompt).token_ids), [], [], sequence))
    while going := [i for i, own in enumerate(played) if len(own.tokens) < count]:
        turns = [Turn(played[i].sequence, min(wanted[i][1], count - 1 - len(played[i].tokens))) for i in going]
        for i, output in zip(going, play_rounds(backend, turns), strict=True):
            played[i].tokens += output.token_ids
            played[i].accepted.append(output.accepted)
            played[i].drafted.append(output.drafted)
    for own, other in zip(played, alone, strict=True):
        assert (own.tokens, own.drafted, own.accepted) == (other.tokens, other.drafted, other.accepted)
        assert torch.equal(own.sequence.cache.state, other.sequence.cache.state)
    assert sum(sum(own.accepted) for own in alone) > 10 or "centroids" in name


@pytest.mark.parametrize("verification", VERIFICATIONS)
@pytest.mark.parametrize("name", [name for name in PAIRS if "agreeing," in name])
def test_greedy_is_the_same_under_every_verification(name: str, verification: Verification) -> None:
    params = SamplingParams(max_tokens=30)
    plain = play(PAIRS[name], [9, 8, 7], params, 0)
    assert play(PAIRS[name], [9, 8, 7], params, 4, verification).tokens == plain.tokens


@pytest.mark.parametrize("verification", ["rejection", "block"])
@pytest.mark.parametrize("name", OFTEN)
def test_sampled_verifications_commit_what_they_count(name: str, verification: Verification) -> None:
    params = SamplingParams(max_tokens=30, temperature=0.8, top_k=20, repetition_penalty=1.1, seed=3)
    played = play(PAIRS[name], [9, 8, 7], params, 4, verification)
    assert len(played.tokens) == 30
    assert 1 + sum(a + 1 for a in played.accepted) == 30
    again = play(PAIRS[name], [9, 8, 7], params, 4, verification)
    assert again.tokens == played.tokens, "a seed decides the output"
