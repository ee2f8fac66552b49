"""What rounds cost on this machine with this pair: measured before the first that needs to know, or kept from then."""

from __future__ import annotations

import time

import torch

from gemma_mtp.decoding.draft_length import LONGEST, RoundCosts
from gemma_mtp.decoding.round import Sequence, open_sequence, play_round, prefill
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.engine.cost_cache import cache_directory, cost_key, load_costs, store_costs
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target

#: seconds that measuring may take; a pair so large that two rounds take longer is measured by two rounds
BUDGET_SECONDS = 0.2
#: lengths in the order they are measured: the ends and the middle first; costs of others lie between
ORDER = (0, 4, LONGEST, 8, 2, 6, 12, 1, 3)
CONTEXT_ROWS, REPEATS = 32, 6


def round_costs(target: Target, drafter: Drafter) -> RoundCosts:
    """Costs from the cache if it has them, else measured, and then kept there."""
    directory = cache_directory()
    if directory is None:
        return measure_costs(target, drafter)
    key = cost_key(target, drafter)
    costs = load_costs(directory, key)
    if costs is None:
        costs = measure_costs(target, drafter)
        store_costs(directory, key, costs)
    return costs


@torch.inference_mode()
def measure_costs(target: Target, drafter: Drafter) -> RoundCosts:
    """Play rounds of every length on a made-up sequence; the least of up to six times each."""
    rounds = (REPEATS + 1) * len(ORDER)
    sequence = open_sequence(target, CONTEXT_ROWS, rounds * (LONGEST + 1), LONGEST, SamplingParams())
    ids = torch.arange(3, 3 + CONTEXT_ROWS, device=sequence.cache.device) % target.config.vocab_size
    prefill(target, sequence, ids, CONTEXT_ROWS)
    seconds: dict[int, float] = {}
    started = time.perf_counter()
    for repeat in range(REPEATS + 1):  # the first warms up, and stands where there is no time for more
        for drafts in ORDER:
            if len(seconds) >= 2 and time.perf_counter() - started > BUDGET_SECONDS:
                return RoundCosts(seconds)
            took = _round_seconds(target, drafter, sequence, drafts)
            seconds[drafts] = took if repeat <= 1 else min(took, seconds[drafts])
    return RoundCosts(seconds)


def _round_seconds(target: Target, drafter: Drafter, sequence: Sequence, drafts: int) -> float:
    started = time.perf_counter()
    play_round(target, drafter, sequence, drafts, "exact")  # ends with a read of the device
    return time.perf_counter() - started
