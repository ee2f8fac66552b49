"""Plain PyTorch on any device: slow, obvious, and row-invariant by construction. The oracle of all other backends.

PyTorch's products may give a row other bits when other rows share the call, because another number of rows may take
another kernel. So the target always runs one fixed shape: `BLOCK` rows whose first position is a multiple of
`BLOCK`, with the row of position p in place p mod `BLOCK`, and padding in the places that the call does not fill. What
a kernel computes for a row then depends on the position alone. Attention reads the same span of rows for every query
of a block, and masks what a query does not see: a masked row has weight 0 exactly, and everything stored is finite.
The head and the experts run one row at a time, and the drafter, which only changes speed, one sequence at a time.

The same holds on a GPU, in bfloat16 too, where a call of `BLOCK` rows takes about as long as one of a single row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemma_mtp.backend.base import DraftedTokens, DraftRows, DraftStep, Rows
from gemma_mtp.backend.device_memory import CARD_RESERVE_BYTES
from gemma_mtp.backend.processor import processor
from gemma_mtp.config import LayerType
from gemma_mtp.decoding.early_stop import chance
from gemma_mtp.decoding.noise import keyed_gumbel
from gemma_mtp.decoding.params import ChoiceKind, Filters
from gemma_mtp.kv.blocks import BLOCK_ROWS
from gemma_mtp.kv.pool import KVCache, KVPool
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import GATHERED_ROWS, rope_for
from gemma_mtp.model.target import Target
from gemma_mtp.ops import reference as ops
from gemma_mtp.sizes.run import REFERENCE_CHUNK_ROWS

#: rows of one call of the target, and what their first position is a multiple of
BLOCK = GATHERED_ROWS


class ReferenceBackend:
    """Runs a pair by PyTorch's operators, in the weights' own dtype."""

    watches_drafts = False
    rounds = None
    chooses: frozenset[ChoiceKind] = frozenset({"argmax", "drawn"})
    chunk_rows = REFERENCE_CHUNK_ROWS

    def __init__(self, target: Target, drafter: Drafter | None = None) -> None:
        self.target, self.drafter = target, drafter

    @property
    def device(self) -> torch.device:
        return self.target.embed_tokens.device

    @property
    def kv_dtype(self) -> torch.dtype:
        return self.target.embed_tokens.dtype

    @property
    def identity(self) -> Mapping[str, str | int]:
        return {"processor": processor(self.device), "operators": "torch", "threads": torch.get_num_threads()}

    def with_drafter(self, drafter: Drafter | None) -> ReferenceBackend:
        return ReferenceBackend(self.target, drafter)

    def workspace_bytes(self, sequences: int, context: int) -> int:
        return CARD_RESERVE_BYTES if self.device.type == "cuda" else 0

    def make_pool(self, counts: Mapping[LayerType, int], slots: int) -> KVPool:
        return KVPool(self.target.config, counts, slots, self.kv_dtype, self.device)

    def forward(self, calls: Sequence[Rows]) -> Tensor:
        return torch.cat([self._forward(call) for call in calls])

    def keep_states(self, caches: Sequence[KVCache], hidden_RD: Tensor, rows: Sequence[int]) -> None:
        for cache, row in zip(caches, rows, strict=True):
            cache.state.copy_(hidden_RD[row])

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return torch.cat([self.target.logits(row_1D.clone()) for row_1D in hidden_RD.split(1)])

    def choose(
        self, hidden_RD: Tensor, rows: Sequence[int], temperatures: Sequence[float] = (), keys: Sequence[int] = (),
        filters: Sequence[Filters] = (),
    ) -> list[int]:  # fmt: skip
        assert not any(one.active for one in filters), "filtered choices are made elsewhere"
        of_rows = zip(rows, temperatures or [0.0] * len(rows), keys or [0] * len(rows), strict=True)
        scores = [
            _noisy(self.target.logits(hidden_RD[row : row + 1].clone()), temperature, key)
            for row, temperature, key in of_rows
        ]
        tokens: list[int] = torch.cat([scores_1V.argmax(-1) for scores_1V in scores]).tolist()  # the first of equals
        return tokens

    def draft(self, calls: Sequence[DraftRows]) -> list[DraftedTokens]:
        return [self._draft(call) for call in calls]

    def draft_step(self, caches: Sequence[KVCache], token_ids_R: Tensor, hidden_RD: Tensor) -> DraftStep:
        steps = [
            self._step(cache, token_1, hidden_1D)
            for cache, token_1, hidden_1D in zip(caches, token_ids_R.split(1), hidden_RD.split(1), strict=True)
        ]
        ids = [step.token_ids_RC for step in steps if step.token_ids_RC is not None]
        return DraftStep(
            torch.cat([step.logits_RC for step in steps]), torch.cat(ids) if ids else None,
            torch.cat([step.projected_RD for step in steps]),
        )  # fmt: skip

    def _forward(self, call: Rows) -> Tensor:
        """Returns the hidden states [keep, D] of one sequence's rows, computed block by block."""
        cache, count = call.cache, len(call.token_ids)
        start, end = cache.table.length, cache.table.length + count
        wanted, states = end - call.keep, []
        for first in range(start // BLOCK * BLOCK, end, BLOCK):
            begin, stop = max(start, first), min(end, first + BLOCK)
            tokens_B = [0] * (begin - first) + call.token_ids[begin - start : stop - start]
            tokens_B += [0] * (BLOCK - len(tokens_B))
            kv = _BlockKeyValues(cache, first, begin, stop)
            tokens_1B = torch.tensor([tokens_B], device=self.device)
            rope = rope_for(self.target.config, torch.arange(first, first + BLOCK, device=self.device), self.kv_dtype)
            hidden_1BD = self.target(tokens_1B, rope, kv, store_only=stop <= wanted)
            if stop > wanted:
                states.append(hidden_1BD[0, max(begin, wanted) - first : stop - first])
        return torch.cat(states)

    def _draft(self, call: DraftRows) -> DraftedTokens:
        token_1 = torch.tensor([call.last_token], device=self.device)
        hidden_1D, reach = call.cache.state[None], 1.0
        tokens: list[int] = []
        confidences: list[float] = []
        while len(tokens) < call.most and (call.stop is None or not tokens or call.stop.goes_on(len(tokens), reach)):
            step = self._step(call.cache, token_1, hidden_1D)
            token_1 = _chosen(step, call.temperature, call.keys[len(tokens)])
            hidden_1D = step.projected_RD
            tokens.append(int(token_1))
            if call.stop is not None:
                confidences.append(_confidence(step, call.temperature, token_1))
                reach *= chance(confidences[-1], call.stop.bias, call.stop.slope)
        return DraftedTokens(tokens, confidences)

    def _step(self, cache: KVCache, token_1: Tensor, hidden_1D: Tensor) -> DraftStep:
        assert self.drafter is not None
        position = torch.tensor([cache.table.length], device=self.device)  # that of the last committed token
        kv = _CommittedKeyValues(cache, self.drafter.config.text.layer_types)
        rope = rope_for(self.target.config, position, self.kv_dtype)
        state_11H, projected_11D = self.drafter(self.target.embed(token_1)[None], hidden_1D[None], rope, kv)
        return DraftStep(*self.drafter.candidates(state_11H[0]), projected_11D[0])


def _noisy(logits_1C: Tensor, temperature: float, key: int, token_ids_1C: Tensor | None = None) -> Tensor:
    """Returns what `choose` takes the arg max of."""
    if temperature == 0:
        return logits_1C
    ids = torch.arange(logits_1C.shape[-1], device=logits_1C.device) if token_ids_1C is None else token_ids_1C
    return logits_1C.double() / temperature + keyed_gumbel([key], ids)


def _chosen(step: DraftStep, temperature: float, key: int) -> Tensor:
    """Returns the token of one row of candidates, [1]: the lowest id among equals."""
    scores_1C = _noisy(step.logits_RC, temperature, key, step.token_ids_RC)
    if step.token_ids_RC is None:
        return scores_1C.argmax(-1)
    best_1C = scores_1C == scores_1C.amax(-1, keepdim=True)
    return step.token_ids_RC.masked_fill(~best_1C, torch.iinfo(torch.int64).max).amin(-1)


def _confidence(step: DraftStep, temperature: float, token_1: Tensor) -> float:
    """Returns the drafter's probability of its draft."""
    probs_C = (step.logits_RC[0].float() / (temperature or 1.0)).softmax(-1)
    return float(probs_C[token_1 if step.token_ids_RC is None else step.token_ids_RC[0] == token_1])


@dataclass
class _BlockKeyValues:
    """Keys and values for one block of rows, `first` .. first + BLOCK - 1, of which `begin` .. stop - 1 are real."""

    cache: KVCache
    first: int
    begin: int
    stop: int
    spans: dict[LayerType, tuple[slice, Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor | None, v_BTGd: Tensor | None) -> Tensor:
        config = self.cache.pool.config
        if k_BTGd is not None and v_BTGd is not None:
            self._append(layer, k_BTGd[0], v_BTGd[0])
        rows, blocks, visible_BS = self._span(config.layer_types[layer])
        k, v = _gathered(self.cache.pool, config.kv_layer(layer), blocks, rows)
        return ops.masked_attention(q_BTHd, k, v, visible_BS)

    def _append(self, layer: int, k_BGd: Tensor, v_BGd: Tensor) -> None:
        """Store the real rows."""
        pool, positions = self.cache.pool, torch.arange(self.begin, self.stop)
        table = torch.tensor(self.cache.table.tables[pool.config.layer_types[layer]])
        blocks, offsets = table[positions // BLOCK_ROWS].to(pool.device), (positions % BLOCK_ROWS).to(pool.device)
        real = slice(self.begin - self.first, self.stop - self.first)
        pool.layers[layer].keys[:, blocks, offsets] = k_BGd[real].transpose(0, 1)
        pool.layers[layer].values[:, blocks, offsets] = v_BGd[real].transpose(0, 1)

    def _span(self, kind: LayerType) -> tuple[slice, Tensor, Tensor]:
        """Returns the rows that any query of the block may see, within the blocks that hold them, and the blocks' ids;
        and which query sees which, [BLOCK, S]. They follow from `first` alone but for the ids."""
        if kind not in self.spans:
            pool, window = self.cache.pool, self.cache.table.windows[kind]
            start, end = window.first_visible(self.first), self.first + BLOCK
            lowest, device = start // BLOCK_ROWS, pool.device
            ids = self.cache.table.tables[kind][lowest : -(-end // BLOCK_ROWS)]
            # blocks that are gone, or not there yet, hold rows that no real query sees: any block does for them
            blocks = torch.tensor(ids, device=device).clamp(min=0)
            rows = torch.arange(start, end, device=device)
            visible_BS = ops.visible_rows(rows[-BLOCK:], rows, window.size)
            self.spans[kind] = slice(start - lowest * BLOCK_ROWS, end - lowest * BLOCK_ROWS), blocks, visible_BS
        return self.spans[kind]


@dataclass
class _CommittedKeyValues:
    """What a drafter attends to: exactly the committed rows of the target's donor layers, in its own layers' order."""

    cache: KVCache
    layer_types: tuple[LayerType, ...]

    def attend(self, layer: int, q_BTHd: Tensor, k_BTGd: Tensor | None, v_BTGd: Tensor | None) -> Tensor:
        kind, pool, table = self.layer_types[layer], self.cache.pool, self.cache.table
        start = table.windows[kind].first_visible(table.length)
        lowest = start // BLOCK_ROWS
        blocks = torch.tensor(table.tables[kind][lowest : -(-table.length // BLOCK_ROWS)], device=pool.device)
        rows = slice(start - lowest * BLOCK_ROWS, table.length - lowest * BLOCK_ROWS)
        return ops.attention(q_BTHd, *_gathered(pool, pool.config.donor_layers[kind], blocks, rows))


def _gathered(pool: KVPool, layer: int, blocks: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Returns copies of some rows of some blocks, each [1, G, S, d]: where blocks lie must not change what is run."""
    stored = pool.layers[layer]
    k, v = (t.index_select(1, blocks).flatten(1, 2)[None, :, rows].contiguous() for t in (stored.keys, stored.values))
    return k, v
