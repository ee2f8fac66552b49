"""What rounds cost on this machine with this pair: measured before the first that needs to know, or kept from then."""

from __future__ import annotations

import dataclasses
import time

import torch

from gemma_mtp.decoding.draft_length import LONGEST, RoundCosts
from gemma_mtp.decoding.round import Sequence, open_sequence, prefill, propose, verify_round
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.engine.cost_cache import cache_directory, cost_key, load_costs, store_costs
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target

#: seconds that measuring may take; a pair so large that two rounds take longer is measured by two rounds
BUDGET_SECONDS = 0.2
#: lengths in the order they are measured: the ends and the middle first; costs of the others lie between
ORDER = (0, 4, LONGEST, 8, 2, 6, 12, 1, 3, 5, 7, 10, 14)
CONTEXT_ROWS, REPEATS = 32, 12


def round_costs(target: Target, drafter: Drafter, argmax: bool = True) -> RoundCosts:
    """Costs from the cache if it has them, else measured, and then kept there.

    `argmax`: of rounds that choose by logits alone (`SamplingParams.is_argmax`), else of rounds that draw.
    """
    directory = cache_directory()
    if directory is None:
        return measure_costs(target, drafter, argmax)
    key = cost_key(target, drafter, argmax)
    costs = load_costs(directory, key)
    if costs is None:
        costs = measure_costs(target, drafter, argmax)
        store_costs(directory, key, costs)
    return costs


@torch.inference_mode()
def measure_costs(target: Target, drafter: Drafter, argmax: bool = True) -> RoundCosts:
    """Play rounds of every length after the same made-up prompt; the least of up to twelve times each."""
    prompt = _made_up_sequence(target, SamplingParams(temperature=0.0 if argmax else 1.0))
    rounds: dict[int, float] = {}
    steps: list[float] = []
    started = time.perf_counter()
    for repeat in range(REPEATS + 1):  # the first warms up, and stands where there is no time for more
        for drafts in ORDER:
            if len(rounds) >= 2 and time.perf_counter() - started > BUDGET_SECONDS:
                return RoundCosts(rounds, min(steps))
            drafting, took = _round_seconds(target, drafter, prompt, drafts)
            rounds[drafts] = took if repeat <= 1 else min(took, rounds[drafts])
            steps += [drafting / drafts] if drafts else []
    return RoundCosts(rounds, min(steps))


def _made_up_sequence(target: Target, params: SamplingParams) -> Sequence:
    """A short prompt, with room for a round of any length."""
    sequence = open_sequence(target, CONTEXT_ROWS, 1, LONGEST, params)
    ids = torch.arange(3, 3 + CONTEXT_ROWS, device=sequence.cache.device) % target.config.vocab_size
    prefill(target, sequence, ids, CONTEXT_ROWS)
    return sequence


def _round_seconds(target: Target, drafter: Drafter, prompt: Sequence, drafts: int) -> tuple[float, float]:
    """Of drafting, and of the whole of a round after the prompt, which is left as it was."""
    started = time.perf_counter()
    proposed = propose(target, drafter, prompt, drafts, "exact")
    drafted = time.perf_counter()
    verify_round(target, dataclasses.replace(prompt), proposed, "exact")  # ends with a read of the device
    took = time.perf_counter() - started
    prompt.cache.length = CONTEXT_ROWS  # the round's rows are garbage again
    return drafted - started, took
