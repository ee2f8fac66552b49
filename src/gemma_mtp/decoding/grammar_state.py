"""Where one sequence stands in its grammar, which is asked about drafts that may not stay.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gemma_mtp.decoding.masks import Bits, allows, everything
from gemma_mtp.decoding.verify import agreeing
from gemma_mtp.errors import SamplingError


class Cursor(Protocol):
    """Where a text stands in what it must be.

    mask   tokens that may come now, None where the text has ended. Raises SamplingError where it can not go on
    take   go on by a token that the mask allows
    back   forget the last tokens. Returns whether that could be done; else the cursor is of no use any more
    keep   none of what has been taken will be forgotten
    complete  whether the text is whole, though more may follow
    """

    def mask(self) -> Bits | None: ...
    def take(self, token_id: int) -> None: ...
    def back(self, count: int) -> bool: ...
    def keep(self) -> None: ...
    @property
    def complete(self) -> bool: ...


class GrammarState:
    """Where one sequence stands in its grammar. `start` makes a cursor before the first token.

    What it answers is a function of the committed tokens and of those it is asked about, which need not be committed
    later. The cursor is left where the last question took it, so that a round asks about each draft once. Where the
    grammar is too complex to go on, that is an error only once a token has to be chosen there: a draft that leads there
    is refused or accepted like any other.
    """

    def __init__(
        self, start: Callable[[], Cursor], end_ids: Collection[int], vocab_size: int, device: torch.device | str
    ) -> None:
        self._start = start
        self._cursor = start()
        self._end_ids = frozenset(end_ids)
        self._vocab_size = vocab_size
        self._device = device
        self._committed: list[int] = []
        self._taken: list[int] = []  # tokens after the committed ones that the cursor has taken
        #: what may come after each of them; None where the text has ended
        self._masks: list[Bits | SamplingError | None] = [self._cursor.mask()]

    def allowed(self, token_ids: Sequence[int], first: int = 0) -> Tensor:
        """What may follow the first i of `token_ids` after the committed tokens, for i = `first` .. len(token_ids).

        bool [R, V] on the device. After a token that the grammar does not allow and after the end every token is
        allowed: such rows never count. Raises SamplingError where the committed tokens leave the grammar too complex.
        """
        return self._unpacked(self._rows(token_ids, first))

    def limits(self, token_ids: Sequence[int], first: int = 0) -> Tensor | None:
        """The same, or None where every token is allowed in every row, which needs no mask."""
        masks = self._rows(token_ids, first)
        free = everything(self._vocab_size)
        return None if all(mask is free for mask in masks) else self._unpacked(masks)

    def _rows(self, token_ids: Sequence[int], first: int) -> list[Bits]:
        self._follow(token_ids)
        if isinstance(self._masks[0], SamplingError):
            raise self._masks[0]
        free = everything(self._vocab_size)
        masks = [mask if isinstance(mask, np.ndarray) else free for mask in self._masks]
        return [*masks, *[free] * (len(token_ids) + 1 - len(masks))][first:]

    def _unpacked(self, masks: Sequence[Bits]) -> Tensor:
        packed_RB = torch.from_numpy(np.stack(masks)).to(self._device)
        shifts = torch.arange(8, dtype=torch.uint8, device=self._device)
        return ((packed_RB.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)[:, : self._vocab_size]

    def ended_after(self, token_ids: Sequence[int]) -> bool:
        """Whether the output has ended after these tokens, is not of the grammar any more, or can not go on."""
        self._follow(token_ids)
        return len(self._taken) < len(token_ids) or not isinstance(self._masks[-1], np.ndarray)

    def complete_after(self, token_ids: Sequence[int]) -> bool:
        """Whether the text is whole after these tokens, though more may follow."""
        self._follow(token_ids)
        return len(self._taken) == len(token_ids) and (self._masks[-1] is None or self._cursor.complete)

    def commit(self, token_ids: Sequence[int]) -> int | None:
        """Move on by a round's tokens.

        Returns how many of them belong to the output where nothing may follow and no end-of-sequence id can say so.
        Raises SamplingError where one was chosen after the grammar had become too complex.
        """
        self._follow(token_ids)
        taken, mask = len(self._taken), self._masks[-1]
        ended = taken < len(token_ids)  # by an end-of-sequence id, or by what follows the end
        if ended and isinstance(mask, SamplingError):
            raise mask
        assert not ended or mask is None or token_ids[taken] in self._end_ids, "a token was chosen against its mask"
        self._committed += self._taken
        self._taken, self._masks = [], [None if ended else mask]
        self._cursor.keep()
        return taken if mask is None else None

    def _follow(self, token_ids: Sequence[int]) -> None:
        """Bring the cursor to the state after as many of these tokens as the grammar takes."""
        kept = agreeing(token_ids, self._taken[: len(token_ids)])
        if kept < len(self._taken):
            self._roll_back(kept)
        for token_id in token_ids[kept:]:
            if not self._takes(token_id):
                return
            self._cursor.take(token_id)
            self._taken.append(token_id)
            try:
                self._masks.append(self._cursor.mask())
            except SamplingError as error:
                self._masks.append(error)

    def _roll_back(self, kept: int) -> None:
        """To after the first `kept` of the tokens taken."""
        if not self._cursor.back(len(self._taken) - kept):
            self._cursor = self._start()
            for token_id in self._committed + self._taken[:kept]:
                self._cursor.take(token_id)
        del self._taken[kept:], self._masks[kept + 1 :]

    def _takes(self, token_id: int) -> bool:
        mask = self._masks[-1]
        if not isinstance(mask, np.ndarray) or token_id in self._end_ids:
            return False
        return allows(mask, token_id)
