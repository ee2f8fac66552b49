"""Our sides: plain, drafted, and drafted with drafts made to be wrong as often as is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
from sides import Side

from gemma_mtp import SamplingParams
from gemma_mtp.backend.base import Backend, DraftedTokens, DraftRows
from gemma_mtp.decoding.draft_length import DraftTokens
from gemma_mtp.decoding.noise import STREAM_ACCEPT, uniform
from gemma_mtp.engine.pair import Pair
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.weights.matrix import matrices


def our_side(pair: Pair, draft_tokens: DraftTokens, max_tokens: int) -> Side:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)

    def run(prompt: list[int]) -> list[int]:
        result = pair.generate(prompt, params, draft_tokens=draft_tokens)
        side.rounds += [(played.drafted, played.committed) for played in result.decode_rounds]
        tokens, seconds = side.decoded
        side.decoded = tokens + len(result.token_ids) - 1, seconds + result.decode_seconds
        return result.token_ids

    side = Side("plain" if draft_tokens == 0 else f"drafted, K = {draft_tokens}", run)
    if pair.drafter is not None and not holds_blocks(pair.target):
        side.step_bytes = target_bytes(pair.target), drafter_bytes(pair.drafter)
    return side


def holds_blocks(target: Target) -> bool:
    """Whether matrices are kept as the blocks of a file, whose bytes are not counted here."""
    return not target.weight_types and any(matrix.stored.quantised for matrix in matrices(target))


def unreliable(pair: Pair, acceptance: float, seed: int = 0) -> Pair:
    """The same pair, with drafts that do all of their work and are then wrong with chance 1 - `acceptance` each.

    For a pair whose drafter always agrees, so that this is the acceptance at every position.
    """
    assert pair.drafter is not None
    return dataclasses.replace(pair, backend=cast("Backend", Unreliable(pair.backend, acceptance, seed)), policies={})


def useless_drafter(pair: Pair) -> Drafter:
    """One of the same shape with random weights: what `auto` may lose with a drafter that is not worth its time."""
    assert pair.drafter is not None
    drafter = Drafter(pair.drafter.config).to(pair.drafter.norm.weight.dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in drafter.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return drafter


class Unreliable:
    """A backend that spoils drafts after it has made them; everything else is the other backend's own.

    Only `draft` is spoilt: choices that no penalty, filter or grammar takes part in. Whether a draft is wrong follows
    from the seed and its position, so that sides with other draft lengths meet the same luck.
    """

    def __init__(self, backend: Backend, acceptance: float, seed: int) -> None:
        self._backend = backend
        self._vocab = backend.target.config.vocab_size
        positions = torch.arange(backend.target.config.max_position_embeddings)
        luck = uniform(seed, positions, torch.zeros(1, dtype=torch.int64), STREAM_ACCEPT)[:, 0]
        self._wrong: list[bool] = (luck >= acceptance).tolist()  # made once: drafting is what is timed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def draft(self, calls: Sequence[DraftRows]) -> list[DraftedTokens]:
        made = zip(calls, self._backend.draft(calls), strict=True)
        return [
            DraftedTokens(self._spoilt(of_one.token_ids, call.cache.table.length + 1), of_one.confidences)
            for call, of_one in made
        ]

    def _spoilt(self, token_ids: list[int], first: int) -> list[int]:
        wrong = self._wrong[first : first + len(token_ids)]
        return [(token + 1) % self._vocab if spoil else token for token, spoil in zip(token_ids, wrong, strict=True)]


def target_bytes(target: Target) -> int:
    """Weight bytes one decode step reads: all matrices, the tied table once as the head; one row of the others."""
    config = target.config
    gathered = {"model.embed_tokens_per_layer.weight"}
    if not config.tie_word_embeddings:
        gathered.add("model.embed_tokens.weight")
    read = {name: size for name, size in _stored_bytes(target).items() if name not in gathered}
    total = sum(read.values())
    if config.enable_moe_block:
        experts = sum(size for name, size in read.items() if ".experts." in name)
        total -= experts * (config.num_experts - config.top_k_experts) // config.num_experts
    return total


def drafter_bytes(drafter: Drafter) -> int:
    """Weight bytes a draft step reads; of a centroid head's table, the rows of the chosen clusters."""
    config = drafter.config
    read = {name: size for name, size in _stored_bytes(drafter).items() if not name.endswith("token_ordering")}
    if config.use_ordered_embeddings:
        table = "model.embed_tokens.weight"
        read[table] = read[table] * config.centroid_intermediate_top_k // config.num_centroids
    return sum(read.values())


def _stored_bytes(model: Target | Drafter) -> dict[str, int]:
    """Of every weight as it is kept for decoding, by its official name."""
    with torch.device("meta"):  # of the model itself, what a backend has reordered would be copied
        like = type(model)(model.config).to(model.embed_tokens.dtype)  # type: ignore[arg-type]
    like.quantise_(model.weight_types)
    return {name: weight.nbytes for name, weight in like.checkpoint_tensors().items()}
