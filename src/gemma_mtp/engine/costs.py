"""What rounds cost on this machine with this pair: measured before the first that needs to know, or kept from then."""

from __future__ import annotations

import dataclasses
import os
import time

import torch

from gemma_mtp.backend.base import Backend
from gemma_mtp.cpu_clock import CpuClock
from gemma_mtp.decoding.params import ChoiceKind, SamplingParams
from gemma_mtp.decoding.round_costs import CONTEXT_ROWS, LONGEST, RoundCosts
from gemma_mtp.engine.cost_cache import cache_directory, cost_key, load_costs, store_costs
from gemma_mtp.engine.draft import propose
from gemma_mtp.engine.round import prefill, verify_round
from gemma_mtp.engine.sequence import Sequence, Turn, open_sequence
from gemma_mtp.engine.whole_rounds import play_whole, plays_whole
from gemma_mtp.kv.blocks import block_counts

#: seconds that measuring may take; a pair so large that two rounds take longer is measured by two rounds
BUDGET_SECONDS = 0.3
#: share of them for the first round of every length: rather few lengths, each played again and again, than many once
FIRST_ROUNDS = 0.2
#: lengths in the order they are measured: costs of the others lie between, or on the line that the last two begin
ORDER = (0, 4, 1, 2, 8, LONGEST, 6, 12, 3, 5, 7, 10, 14)
REPEATS = 12
#: share of the cores' time that other processes may take while costs are measured that are kept
MOST_ELSEWHERE = 0.1
#: what stands for all parameters that choose in one way
CHOICES: dict[ChoiceKind, SamplingParams] = {
    "argmax": SamplingParams(), "drawn": SamplingParams(temperature=1.0),
    "filtered": SamplingParams(temperature=1.0, top_k=64, top_p=0.95),
    "processed": SamplingParams(temperature=1.0, top_p=0.95, logit_bias={0: 0.0}),
}  # fmt: skip


def round_costs(backend: Backend, choice: ChoiceKind = "argmax", sequences: int = 1) -> RoundCosts:
    """Costs from the cache if it has them, else measured, and then kept there, unless the machine was busy meanwhile.

    `choice`: of rounds that choose so (`SamplingParams.choice`). `sequences`: that many play each round together.
    """
    directory = cache_directory()
    if directory is None:
        return measure_costs(backend, choice, sequences)
    key = cost_key(backend, choice, sequences)
    costs = load_costs(directory, key)
    if costs is None:
        clock = CpuClock([os.getpid()])
        costs = measure_costs(backend, choice, sequences)
        if (clock.share_elsewhere() or 0.0) <= MOST_ELSEWHERE:
            store_costs(directory, key, costs)
    return costs


@torch.inference_mode()
def measure_costs(backend: Backend, choice: ChoiceKind = "argmax", sequences: int = 1) -> RoundCosts:
    """Play rounds of so many sequences after the same made-up prompt, of as many lengths as there is time for; the
    least of up to twelve times each, of all the sequences' rounds together.

    Rounds that the backend plays as a whole are measured as they are replayed: the first of each length, which records
    it, is not counted, and nothing is known of what drafting takes of them.
    """
    prompts = _made_up_sequences(backend, CHOICES[choice], sequences)
    rounds: dict[int, float] = {}
    drafting: dict[int, float] = {}
    started = time.perf_counter()
    for repeat in range(REPEATS + 1):  # the first warms up, and stands where there is no time for more
        for drafts in ORDER if repeat == 0 else tuple(rounds):
            taken = time.perf_counter() - started
            if len(rounds) >= 2 and taken > BUDGET_SECONDS:
                return RoundCosts(rounds, drafting)
            if repeat == 0 and len(rounds) >= 2 and taken > FIRST_ROUNDS * BUDGET_SECONDS:
                break
            if repeat == 0 and _are_whole(backend, prompts, drafts):
                begun = time.perf_counter()
                _round_seconds(backend, prompts, drafts)
                started += time.perf_counter() - begun
            of_drafts, took = _round_seconds(backend, prompts, drafts)
            rounds[drafts] = took if repeat <= 1 else min(took, rounds[drafts])
            drafting[drafts] = of_drafts if repeat <= 1 else min(of_drafts, drafting[drafts])
    return RoundCosts(rounds, drafting)


def _made_up_sequences(backend: Backend, params: SamplingParams, count: int) -> list[Sequence]:
    """Returns sequences of short prompts, with room for a round of any length."""
    config, rows = backend.target.config, CONTEXT_ROWS + 1 + LONGEST
    of_one = block_counts(config.sliding_window, rows, CONTEXT_ROWS)
    pool = backend.make_pool({kind: count * blocks for kind, blocks in of_one.items()}, count)
    prompt = [token_id % config.vocab_size for token_id in range(3, 3 + CONTEXT_ROWS)]
    sequences = []
    for _ in range(count):
        cache = pool.cache(rows)
        cache.open()
        sequences.append(open_sequence(backend, cache, params, prompt))
        prefill(backend, sequences[-1], prompt)
    return sequences


def _are_whole(backend: Backend, prompts: list[Sequence], drafts: int) -> bool:
    return all(plays_whole(backend, Turn(prompt, drafts)) for prompt in prompts)


def _round_seconds(backend: Backend, prompts: list[Sequence], drafts: int) -> tuple[float, float]:
    """Returns the seconds of drafting, and of the whole of a round after the prompts, which are left as they were."""
    states = [prompt.cache.state.clone() for prompt in prompts]
    turns = [Turn(dataclasses.replace(prompt), drafts) for prompt in prompts]
    started = drafted = time.perf_counter()
    if _are_whole(backend, prompts, drafts):
        play_whole(backend, turns)
    else:
        proposed = propose(backend, turns)
        drafted = time.perf_counter()
        verify_round(backend, turns, proposed)
    took = time.perf_counter() - started  # it ended with a read of the device
    for prompt, state in zip(prompts, states, strict=True):
        prompt.cache.table.length = CONTEXT_ROWS  # the round's rows are garbage again
        prompt.cache.state.copy_(state)
    return drafted - started, took
