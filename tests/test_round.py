"""`exact` verification equals plain decoding, token for token, whatever the drafter."""

from types import SimpleNamespace

import pytest
import torch
from gemma_mtp.decoding.draft import draft_noise
from gemma_mtp.decoding.round import Turn, open_sequence, prefill, propose, verify_round
from gemma_mtp.kv_cache import KVPool
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, F, Played, S, agreeing_pair, packed, play, random_drafter, random_target, slow_decode

from gemma_mtp.decoding import draft as draft_module
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.decoding.verify import VERIFICATIONS

PAIRS = {
    "random": (random_target(), random_drafter()),
    "centroids": (random_target(3), random_drafter(seed=4, centroids=True)),
    "agreeing": agreeing_pair(0),
    "agreeing often": agreeing_pair(3),
    "native": packed(*agreeing_pair(3)),
    "native, centroids": packed(random_target(3), random_drafter(seed=4, centroids=True)),
}


class AlwaysWrong:
    """A hostile drafter: it knows the target's output and always proposes something else."""

    def __init__(self, prompt_length: int, plain: list[int]) -> None:
        self.native = None
        self.config = SimpleNamespace(text=SimpleNamespace(layer_types=(S,)))
        self.plain, self.length, self.step = plain, prompt_length + 1, 0
        self.prompt_length = prompt_length

    def __call__(self, embeds, hidden, rope, kv):
        return hidden, hidden

    def candidates(self, state):
        right = self.plain[min(self.length - self.prompt_length + self.step, len(self.plain) - 1)]
        self.step += 1
        return torch.zeros(1, 1), torch.tensor([[(right + 1) % VOCAB]])

    def after_round(self, sequence) -> None:
        self.length, self.step = sequence.length, 0


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
@settings(max_examples=120)
def test_drafted_equals_plain(name: str, prompt: list[int], params: SamplingParams, draft_tokens: int) -> None:
    target, drafter = PAIRS[name]
    plain = play(target, None, prompt, params, 0)
    drafted = play(target, drafter, prompt, params, draft_tokens)
    assert drafted.tokens == plain.tokens
    assert len(plain.tokens) == params.max_tokens


@given(prompts, parameters, st.integers(0, 8))
@settings(max_examples=15)
def test_rounds_equal_the_slow_reference(prompt: list[int], params: SamplingParams, draft_tokens: int) -> None:
    target, drafter = PAIRS["agreeing"]
    played = play(target, drafter, prompt, params, draft_tokens, chunk_rows=9)
    assert played.tokens == slow_decode(target, prompt, params, params.max_tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft_tokens", [1, 5, 8])
def test_an_always_wrong_drafter_changes_nothing(draft_tokens: int, temperature: float) -> None:
    target, prompt = random_target(5), [4, 8, 15, 16, 23, 42]
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=9)
    plain = play(target, None, prompt, params, 0)
    hostile = AlwaysWrong(len(prompt), plain.tokens)
    drafted = play(target, hostile, prompt, params, draft_tokens, after_round=hostile.after_round)  # type: ignore[arg-type]
    assert drafted.tokens == plain.tokens
    assert sum(drafted.accepted) == 0 and sum(drafted.drafted) > 0


def test_drafts_past_the_window_are_accepted_too() -> None:
    """The agreeing pair accepts well beyond several windows, so the property above covers accepted blocks."""
    target, drafter = PAIRS["agreeing often"]
    played = play(target, drafter, [1, 2, 3], SamplingParams(max_tokens=150), 4)
    assert sum(played.accepted) > 0.3 * sum(played.drafted)


@pytest.mark.parametrize("name", ["agreeing often", "native"])
def test_a_round_ends_with_the_state_that_produced_its_last_token(name: str) -> None:
    """The next round's drafts begin with it; no output shows whether it is the right one."""
    target, drafter = PAIRS[name]
    states: list[dict[int, torch.Tensor]] = [{}, {}]
    for found, used, drafts in zip(states, (None, drafter), (0, 4), strict=True):
        played = play(
            target, used, [1, 2, 3], SamplingParams(max_tokens=80), drafts,
            after_round=lambda sequence, found=found: found.update({sequence.length: sequence.last_state.clone()}),
        )  # fmt: skip
    assert sum(played.accepted) > 10
    plain, drafted = states
    for length, state in drafted.items():
        torch.testing.assert_close(state, plain[length])


def test_coupled_drafts_agree_more_than_independent_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafting with the target's own noise is what makes `exact` accept at temperature 1 (Gumbel coupling)."""
    target, drafter = PAIRS["agreeing"]

    def accepted() -> float:
        runs = [play(target, drafter, [5, 6], SamplingParams(max_tokens=60, temperature=1.0, seed=s), 1)
                for s in range(10)]  # fmt: skip
        return sum(sum(r.accepted) for r in runs) / sum(sum(r.drafted) for r in runs)

    coupled = accepted()
    monkeypatch.setattr(draft_module, "draft_noise", lambda coupled, *rest: draft_noise(False, *rest))
    assert coupled > 2 * accepted()


@pytest.mark.parametrize("name", ["native", "native, centroids", "agreeing"])
def test_sequences_of_a_round_go_on_as_each_would_alone(name: str) -> None:
    """Not their tokens only, which a wrong state would leave as they are, but the drafts made from it."""
    target, drafter = PAIRS[name]
    ways = [({}, 4), ({"temperature": 0.7}, 2), ({"temperature": 0.9, "top_k": 20}, 5), ({}, 0), ({"logprobs": 1}, 3)]
    wanted = [(SamplingParams(max_tokens=40, seed=9, **options), drafts) for options, drafts in ways]
    prompts = [[5 + i, 6, 7][: 1 + i % 3] for i in range(len(wanted))]
    alone = [play(target, drafter, prompt, *own) for prompt, own in zip(prompts, wanted, strict=True)]
    pool = KVPool(target.config, {kind: 8 * len(wanted) for kind in (S, F)}, target.compute_dtype, "cpu")
    played = []
    for prompt, (params, drafts) in zip(prompts, wanted, strict=True):
        sequence = open_sequence(target, len(prompt), params.max_tokens, drafts, params, pool)
        played.append(Played(prefill(target, sequence, torch.tensor(prompt)).token_ids, [], [], sequence))
    while going := [i for i, own in enumerate(played) if len(own.tokens) < 40]:
        turns = [Turn(played[i].sequence, min(wanted[i][1], 39 - len(played[i].tokens))) for i in going]
        for i, output in zip(going, verify_round(target, turns, propose(target, drafter, turns)), strict=True):
            played[i].tokens += output.token_ids
            played[i].accepted.append(output.accepted)
            played[i].drafted.append(output.drafted)
    for own, other in zip(played, alone, strict=True):
        assert (own.tokens, own.drafted, own.accepted) == (other.tokens, other.drafted, other.accepted)
        assert torch.equal(own.sequence.last_state, other.sequence.last_state)
    assert sum(sum(own.accepted) for own in alone) > 10 or "centroids" in name


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_greedy_is_the_same_under_every_verification(verification) -> None:
    target, drafter = PAIRS["agreeing"]
    params = SamplingParams(max_tokens=60)
    assert (
        play(target, drafter, [9, 8, 7], params, 4, verification).tokens
        == play(target, None, [9, 8, 7], params, 0).tokens
    )


@pytest.mark.parametrize("verification", ["rejection", "block"])
def test_sampled_verifications_commit_what_they_count(verification) -> None:
    target, drafter = PAIRS["agreeing often"]
    params = SamplingParams(max_tokens=60, temperature=0.8, top_k=20, repetition_penalty=1.1, seed=3)
    played = play(target, drafter, [9, 8, 7], params, 4, verification)
    assert len(played.tokens) == 60
    assert 1 + sum(a + 1 for a in played.accepted) == 60
    again = play(target, drafter, [9, 8, 7], params, 4, verification)
    assert again.tokens == played.tokens, "a seed decides the output"
