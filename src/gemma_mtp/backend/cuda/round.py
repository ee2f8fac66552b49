"""A whole round on the device: drafts, one target call over them, choices, what is accepted, the sequences moved on.

Nothing in it reads the device or follows from what is on it: the same calls on the same memory play any round of its
shape, so that it can be recorded once and replayed.

Shapes: B places of sequences, K drafts, T = K + 1 rows of a sequence, R = B * T rows, S slots of the pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gemma_mtp.backend.cuda.attention import Seen, Stacks, rows_of_stack
from gemma_mtp.backend.cuda.batch import Batch, heads_of, stacks_of
from gemma_mtp.backend.cuda.draws import DeviceFilters, Draws
from gemma_mtp.config import LAYER_TYPES, SLIDING, LayerType, TextConfig
from gemma_mtp.decoding.noise import row_keys
from gemma_mtp.decoding.params import ChoiceKind
from gemma_mtp.decoding.verify import verify_exact
from gemma_mtp.kv.blocks import blocks_of
from gemma_mtp.kv.pool import KVPool

#: what the host says of each place, int64. `LIMIT`: drafts at most, -1 for a place without a sequence. `FRESH`: whether
#: `LAST` and `LENGTH` hold, or what the round before left in the slot. `TEMPERATURE`, `TOP_P`, and
#: `LEAST`, the logarithm of min_p: the bits of a float64
SLOT, FRESH, LAST, LENGTH, LIMIT, NOISE, TEMPERATURE, TOP_K, TOP_P, LEAST, FIELDS = range(11)


class Shape(NamedTuple):
    """What a recorded round is for. `choice`: what the most particular of its sequences needs. `reach`: no row lies at
    a position from there on; it decides no bits."""

    drafts: int
    places: int
    choice: ChoiceKind
    reach: int


class RoundModels(Protocol):
    """The calls of a pair that a round is made of. None may read the device."""

    def run(self, batch: Batch, pool: KVPool) -> Tensor:
        """Returns the target's hidden states after the final norm, [R, D]."""
        ...

    def choose(self, hidden_RD: Tensor, draws: Draws | None) -> Tensor:
        """Returns the target's choice at each row, int64 [R]."""
        ...

    def draft(self, batch: Batch, pool: KVPool, hidden_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the drafter's state for its head [B, H], and the projected state [B, D]."""
        ...

    def choose_draft(self, state_BH: Tensor, draws: Draws | None) -> Tensor:
        """Returns the drafts, int64 [B]."""
        ...


@dataclass(frozen=True)
class SlotState:
    """Where the sequence of each slot of a pool is, as the last round left it: int64 [S] each."""

    last_S: Tensor
    length_S: Tensor


class Layout:
    """The rows of calls of so many for each place: their owners and stacks, which never change."""

    def __init__(self, config: TextConfig, places: int, rows: int, device: torch.device) -> None:
        self.owners_R = torch.arange(places, dtype=torch.int32).repeat_interleave(rows).to(device)
        self.stacks: dict[LayerType, Stacks] = {}
        self.windows: dict[LayerType, int] = {}
        for kind in LAYER_TYPES:
            of_kind = stacks_of([rows] * places, rows_of_stack(*heads_of(config, kind))[0])
            self.stacks[kind] = Stacks(*(torch.tensor(ints, dtype=torch.int32).to(device) for ints in of_kind))
            self.windows[kind] = config.sliding_window if kind == SLIDING else 0

    def batch(
        self, token_ids_R: Tensor, positions_R: Tensor, tables: Mapping[LayerType, Tensor], reach: int, behind: int
    ) -> Batch:
        """Returns the batch of rows at these positions, int32; -1 is padding."""
        seen = {
            kind: Seen(positions_R, self.owners_R, tables[kind], self.windows[kind], behind) for kind in LAYER_TYPES
        }
        return Batch(token_ids_R, self.stacks, seen, reach)


class Buffers:
    """The memory of one shape of round. `control_FB` and `tables` are written before it; `result_BT` is read after it:
    how many tokens were committed, and the choices of all rows, int32 [B, 1 + T]."""

    def __init__(self, shape: Shape, target: TextConfig, drafter: TextConfig | None, device: torch.device) -> None:
        self.shape = shape
        self.control_FB = torch.zeros(FIELDS, shape.places, dtype=torch.int64, device=device)
        kinds = len(LAYER_TYPES)
        self.tables_NBW = torch.zeros(kinds, shape.places, blocks_of(shape.reach), dtype=torch.int32, device=device)
        self.tables = dict(zip(LAYER_TYPES, self.tables_NBW, strict=True))
        self.result_BT = torch.zeros(shape.places, shape.drafts + 2, dtype=torch.int32, device=device)
        self.rows = Layout(target, shape.places, shape.drafts + 1, device)
        self.drafts = None if drafter is None else Layout(drafter, shape.places, 1, device)


def play_round(models: RoundModels, buffers: Buffers, state: SlotState, pool: KVPool) -> None:
    """Play one round of the sequences in `buffers`, and leave its result there and each sequence's state in its slot.

    A row beyond a place's limit is padding: it computes nothing that anyone reads, and stores no keys and values. A
    round that ends in an error on its way has changed nothing that another of the same buffers reads.
    """
    (K, B, choice, reach), control_FB = buffers.shape, buffers.control_FB
    T, device = K + 1, control_FB.device
    slot_B, limit_B = control_FB[SLOT], control_FB[LIMIT]
    fresh_B, active_B = control_FB[FRESH] > 0, limit_B >= 0
    last_B = torch.where(fresh_B, control_FB[LAST], state.last_S.index_select(0, slot_B))
    length_B = torch.where(fresh_B, control_FB[LENGTH], state.length_S.index_select(0, slot_B))
    hidden_BD = pool.states.index_select(0, slot_B)
    steps_T = torch.arange(T, device=device)
    places_BT = length_B[:, None] + steps_T
    draws_B = _draws(control_FB, choice, row_keys(control_FB[NOISE][:, None], places_BT + 1))

    drafts_BK = torch.zeros(B, 0, dtype=torch.int64, device=device)
    if K:
        drafts_BK = _drafts(models, buffers, pool, last_B, length_B, hidden_BD, draws_B)
    seen_BT = active_B[:, None] & (steps_T <= limit_B[:, None])
    positions_R = torch.where(seen_BT, places_BT, -1).int().flatten()
    tokens_R = torch.cat((last_B[:, None], drafts_BK), 1).int().flatten()
    hidden_RD = models.run(buffers.rows.batch(tokens_R, positions_R, buffers.tables, reach, 0), pool)
    draws_R = None if draws_B is None else draws_B.repeated(T)._replace(keys_R=draws_B.keys_R.flatten())
    choices_BT = models.choose(hidden_RD, draws_R).view(B, T)

    # a draft beyond the limit equals no choice
    within_BK = torch.where(seen_BT[:, 1:], drafts_BK, -1)
    accepted_B = verify_exact(choices_BT, within_BK).n_accepted
    count_B = torch.where(active_B, accepted_B + 1, 0)
    final_B = choices_BT.gather(1, accepted_B[:, None])[:, 0]
    rows_B = torch.arange(B, device=device) * T + accepted_B
    new_BD = torch.where(active_B[:, None], hidden_RD.index_select(0, rows_B), hidden_BD)
    last_B, length_B = torch.where(active_B, final_B, last_B), length_B + count_B
    result_BT = torch.cat((count_B[:, None], choices_BT), 1)
    # all at the end, where nothing is left that could lack memory: until here the round may be played again
    pool.states.index_copy_(0, slot_B, new_BD)
    state.last_S.index_copy_(0, slot_B, last_B)
    state.length_S.index_copy_(0, slot_B, length_B)
    buffers.result_BT.copy_(result_BT)


def _draws(control_FB: Tensor, choice: ChoiceKind, keys_BT: Tensor) -> Draws | None:
    """Returns how each place is drawn, with the keys of all of its rows [B, T]; None where none is."""
    if choice == "argmax":
        return None
    temperature_B, top_p_B, least_B = (control_FB[i].clone().view(torch.float64) for i in (TEMPERATURE, TOP_P, LEAST))
    filters = DeviceFilters(control_FB[TOP_K].clone(), top_p_B, least_B) if choice == "filtered" else None
    return Draws(temperature_B, keys_BT, filters)


def _drafts(
    models: RoundModels, buffers: Buffers, pool: KVPool, last_B: Tensor, length_B: Tensor, hidden_BD: Tensor,
    draws_B: Draws | None,
) -> Tensor:  # fmt: skip
    """Returns K drafts of each place, int64 [B, K]; those beyond its limit are of no use."""
    assert buffers.drafts is not None
    shape, token_B, made = buffers.shape, last_B, []
    positions_B = torch.where(buffers.control_FB[LIMIT] > 0, length_B, -1).int()
    for step in range(shape.drafts):
        batch = buffers.drafts.batch(token_B, positions_B, buffers.tables, shape.reach, 1)
        state_BH, hidden_BD = models.draft(batch, pool, hidden_BD)
        draws = None if draws_B is None else draws_B._replace(keys_R=draws_B.keys_R[:, step].clone())
        token_B = models.choose_draft(state_BH, draws)
        made.append(token_B)
    return torch.stack(made, 1)
