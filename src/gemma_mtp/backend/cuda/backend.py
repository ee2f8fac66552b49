"""The kernels as a backend: bf16, int8 and int4 weights, many sequences a call, the same bits whatever shares it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import triton
from torch import Tensor

from gemma_mtp.backend.base import DraftedTokens, DraftRows, DraftStep, Rows
from gemma_mtp.backend.cuda.batch import Part, make_batch
from gemma_mtp.backend.cuda.device_round import DeviceRounds
from gemma_mtp.backend.cuda.draws import draws_on
from gemma_mtp.backend.cuda.launch import Launch, on_device
from gemma_mtp.backend.cuda.models import DeviceDrafter, DeviceTarget, PairCalls, RopeTables
from gemma_mtp.backend.cuda.replay import CudaReplays, Replays
from gemma_mtp.backend.cuda.tiles import VERSION
from gemma_mtp.backend.cuda.usable import why_not
from gemma_mtp.backend.processor import processor
from gemma_mtp.config import LayerType
from gemma_mtp.decoding.early_stop import StopRule, chance
from gemma_mtp.decoding.params import ChoiceKind, Filters
from gemma_mtp.errors import DeviceError
from gemma_mtp.kv.pool import KVCache, KVPool
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.sizes import card

_Made = TypeVar("_Made")


class CudaBackend:
    """Runs a pair by Triton kernels. The models' weights must stay as they are while it lives."""

    kv_dtype = torch.bfloat16
    chunk_rows = card.CARD_CHUNK_ROWS
    watches_drafts = False
    chooses: frozenset[ChoiceKind] = frozenset({"argmax", "drawn", "filtered"})

    def __init__(
        self, target: Target, drafter: Drafter | None = None, launch: Launch = on_device,
        device_target: DeviceTarget | None = None, replays: Replays | None = None,
    ) -> None:  # fmt: skip
        """`device_target`: the target's, where there is one already. `replays`: plays whole rounds; CUDA's where the
        launch is CUDA's, and without any the host takes part in every round. Raises DeviceError where the kernels can
        not run the pair, unless another `launch` runs them."""
        if launch is on_device and (reason := why_not(target, drafter)) is not None:
            raise DeviceError(f"The Triton kernels can not run this pair, because {reason}.")
        self.target, self.drafter = target, drafter
        self.launch = launch
        self.on_device = device_target or DeviceTarget(target)
        self.drafts = None if drafter is None else DeviceDrafter(drafter, self.on_device)
        self.ropes = RopeTables(target.config, self.device)
        self.replays = CudaReplays(self.device) if replays is None and launch is on_device else replays
        self.rounds = None if self.replays is None else self._rounds(self.replays)

    @property
    def device(self) -> torch.device:
        return self.on_device.table.data.device

    @property
    def identity(self) -> Mapping[str, str | int]:
        return {
            "processor": processor(self.device), "operators": f"triton {triton.__version__}, parts {VERSION}",
            "threads": torch.get_num_threads(),
        }  # fmt: skip

    def with_drafter(self, drafter: Drafter | None) -> CudaBackend:
        return CudaBackend(self.target, drafter, self.launch, self.on_device, self.replays)

    def _rounds(self, replays: Replays) -> DeviceRounds:
        target, drafts, launch, ropes = self.on_device, self.drafts, self.launch, self.ropes
        drafter = None if self.drafter is None else self.drafter.config.text
        return DeviceRounds(
            lambda reach: PairCalls(launch, target, drafts, ropes.reaching(reach)), self.target.config, drafter, replays
        )

    def workspace_bytes(self, sequences: int, context: int) -> int:
        drafter = None if self.drafter is None else self.drafter.config
        return card.workspace_bytes(self.target.config, drafter, sequences, context)

    def make_pool(self, counts: Mapping[LayerType, int], slots: int) -> KVPool:
        return self._with_room(lambda: KVPool(self.target.config, counts, slots, self.kv_dtype, self.device))

    def _with_room(self, call: Callable[[], _Made]) -> _Made:
        """Returns what a call gives that may be made again; what is recorded makes room for it."""
        return call() if self.rounds is None else self.rounds.with_room(call)

    def forward(self, calls: Sequence[Rows]) -> Tensor:
        return self._with_room(lambda: self._forward(calls))

    def _forward(self, calls: Sequence[Rows]) -> Tensor:
        parts = [Part(call.cache, call.token_ids, call.cache.table.length) for call in calls]
        batch = make_batch(self.target.config, parts, self.device)
        hidden_RD = self.on_device.forward(
            self.launch, batch, calls[0].cache.pool, self.ropes.reaching(batch.most_rows)
        )
        if all(call.keep == len(call.token_ids) for call in calls):
            return hidden_RD
        pieces = hidden_RD.split([len(call.token_ids) for call in calls])
        return torch.cat([piece[-call.keep :] for piece, call in zip(pieces, calls, strict=True)])

    def keep_states(self, caches: Sequence[KVCache], hidden_RD: Tensor, rows: Sequence[int]) -> None:
        slots = torch.tensor([[cache.slot for cache in caches], list(rows)]).to(self.device)
        caches[0].pool.states.index_copy_(0, slots[0], hidden_RD.index_select(0, slots[1]))

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self._with_room(lambda: self.on_device.logits(self.launch, hidden_RD))

    def choose(
        self, hidden_RD: Tensor, rows: Sequence[int], temperatures: Sequence[float] = (), keys: Sequence[int] = (),
        filters: Sequence[Filters] = (),
    ) -> list[int]:  # fmt: skip
        picked = torch.tensor(list(rows), dtype=torch.int32).to(self.device)
        draws = draws_on(self.device, temperatures, keys, filters)
        found = self._with_room(lambda: self.on_device.choose(self.launch, hidden_RD.contiguous(), picked, draws))
        tokens: list[int] = found.tolist()
        return tokens

    def draft(self, calls: Sequence[DraftRows]) -> list[DraftedTokens]:
        return self._with_room(lambda: self._draft(calls))

    def _draft(self, calls: Sequence[DraftRows]) -> list[DraftedTokens]:
        drafted = [DraftedTokens([], []) for _ in calls]
        watched = [i for i, call in enumerate(calls) if call.stop is not None]
        plain = [i for i, call in enumerate(calls) if call.stop is None]
        for i, tokens in zip(plain, self._drafted([calls[i] for i in plain]), strict=True):
            drafted[i] = DraftedTokens(tokens, [])
        for i in watched:
            drafted[i] = self._watched(calls[i])
        return drafted

    def draft_step(self, caches: Sequence[KVCache], token_ids_R: Tensor, hidden_RD: Tensor) -> DraftStep:
        return self._with_room(lambda: self._draft_step(caches, token_ids_R, hidden_RD))

    def _draft_step(self, caches: Sequence[KVCache], token_ids_R: Tensor, hidden_RD: Tensor) -> DraftStep:
        assert self.drafts is not None
        state, projected = self._step(caches, token_ids_R, hidden_RD)
        return DraftStep(*self.drafts.candidates(self.launch, state), projected)

    def _drafted(self, calls: Sequence[DraftRows]) -> list[list[int]]:
        """Returns the drafts of sequences without a stop rule. The host waits once, at the end."""
        if not calls:
            return []
        drafts = self.drafts_on_device(calls).tolist()
        return [tokens[: call.most] for tokens, call in zip(drafts, calls, strict=True)]

    def drafts_on_device(self, calls: Sequence[DraftRows]) -> Tensor:
        """Returns as many drafts for each sequence as the one that wants most gets, int64 [sequences, K]."""
        assert self.drafts is not None
        caches = [call.cache for call in calls]
        tokens = torch.tensor([call.last_token for call in calls]).to(self.device)
        hidden = torch.stack([cache.state for cache in caches])
        made, temperatures = [], [call.temperature for call in calls]
        for step in range(max(call.most for call in calls)):
            state, hidden = self._step(caches, tokens, hidden)
            keys = [call.keys[step] if step < len(call.keys) else 0 for call in calls]
            draws = draws_on(self.device, temperatures, keys, [call.filters for call in calls])
            tokens = self.drafts.choose(self.launch, state, draws)
            made.append(tokens)
        return torch.stack(made, 1)

    def _watched(self, call: DraftRows) -> DraftedTokens:
        """Returns the drafts of a sequence whose stop rule looks at each one's confidence: a host read a draft."""
        assert call.stop is not None and self.drafts is not None
        token, hidden, reach = torch.tensor([call.last_token]).to(self.device), call.cache.state[None], 1.0
        tokens: list[int] = []
        confidences: list[float] = []
        while len(tokens) < call.most and _goes_on(call.stop, len(tokens), reach):
            state, hidden = self._step([call.cache], token, hidden)
            logits, ids = self.drafts.candidates(self.launch, state)
            # as without a rule: a choice does not depend on whether it is watched
            draws = draws_on(self.device, [call.temperature], [call.keys[len(tokens)]], [call.filters])
            token = self.drafts.choose(self.launch, state, draws)
            probs_C = (logits[0] / (call.temperature or 1.0)).softmax(-1)
            confidences.append(float(probs_C[token if ids is None else ids[0] == token]))
            tokens.append(int(token))
            reach *= chance(confidences[-1], call.stop.bias, call.stop.slope)
        return DraftedTokens(tokens, confidences)

    def _step(self, caches: Sequence[KVCache], token_ids_R: Tensor, hidden_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Run one step of the drafter; each sequence's row stands at its committed length and sees what lies before."""
        assert self.drafts is not None
        parts = [Part(cache, [0], cache.table.length) for cache in caches]
        batch = make_batch(self.drafts.config.text, parts, self.device, behind=1)
        batch = batch.with_tokens(token_ids_R)
        ropes = self.ropes.reaching(batch.most_rows)
        return self.drafts.step(self.launch, batch, caches[0].pool, hidden_RD, ropes)


def _goes_on(stop: StopRule, made: int, reach: float) -> bool:
    return made == 0 or stop.goes_on(made, reach)
