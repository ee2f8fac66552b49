"""Where one text stands in one compiled grammar: what may come next after every token, as `GrammarState` asks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import numpy as np

from gemma_mtp.decoding.masks import Bits, mask_bytes, put
from gemma_mtp.errors import SamplingError

if TYPE_CHECKING:
    from llguidance import LLMatcher


class MatcherCursor:
    """`start` is shared with others, and left as it is. `refused` makes an error of what llguidance says."""

    def __init__(
        self, start: LLMatcher, name: str, refused: Callable[[str], SamplingError], matcher_end_id: int,
        end_ids: Collection[int], vocab_size: int,
    ) -> None:  # fmt: skip
        self._matcher = start.deep_copy()
        self._name, self._refused = name, refused
        self._matcher_end_id, self._end_ids, self._vocab_size = matcher_end_id, end_ids, vocab_size

    def mask(self) -> Bits | None:
        """Tokens that may come now: uint8 [B], or None where none may and the text is complete. Raises SamplingError
        where the grammar is too complex to go on, or needs a token that there is not."""
        bits = np.zeros(mask_bytes(self._vocab_size), dtype=np.uint8)
        found = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)[: len(bits)]
        if self._matcher.is_error():
            raise self._refused(self._matcher.get_error())
        complete = self._matcher.is_accepting()
        bits[: len(found)] = found
        bits[-1] &= 0xFF >> (-self._vocab_size % 8)  # ids that the target does not have
        if self._matcher_end_id < self._vocab_size:
            put(bits, self._matcher_end_id, False)
        for token_id in self._end_ids:
            put(bits, token_id, complete)
        if bits.any():
            return bits
        if not complete:
            raise SamplingError(f"the {self._name} needs text here that the target has no token for.")
        return None

    def accepts(self, token_id: int) -> bool:
        """Whether the text may go on with a token. Of texts that must come next, a mask allows one way to write them in
        tokens, that of the tokenizer; here every way is right."""
        return bool(self._matcher.validate_tokens([token_id]) == 1)

    def take(self, token_id: int) -> None:
        """Go on by a token, which it accepts."""
        self._matcher.consume_token(token_id)

    def back(self, count: int) -> bool:
        """Forget the last tokens. Returns whether that could be done: a matcher never leaves an error."""
        if self._matcher.is_error():
            return False
        self._matcher.rollback(count)
        return True

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_accepting())

    def keep(self) -> None:
        """What has been taken stays."""
