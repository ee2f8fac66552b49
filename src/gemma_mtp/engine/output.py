"""Turns rounds into output: cuts at the exact token that ends it."""

from __future__ import annotations

from collections.abc import Collection

from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.sampling import TopLogprobs
from gemma_mtp.engine.result import GenerationResult, RoundStats, TokenLogprob
from gemma_mtp.engine.round import RoundOutput

PLAIN_ROUND = RoundStats(0, 0, 1)


class OutputBuilder:
    """Collects one sequence's committed tokens into a `GenerationResult`."""

    __slots__ = ("_text", "_watched", "max_tokens", "result", "stop_token_ids")

    def __init__(
        self, result: GenerationResult, params: SamplingParams, max_tokens: int, eos_token_ids: Collection[int]
    ) -> None:
        self.result = result
        self.max_tokens = max_tokens
        self.stop_token_ids = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        self._text = result.text_reader() if result.stop else None  # else readers make text of the tokens themselves
        self._watched = self._text is not None or not max_tokens  # tokens are looked at one by one, or not wanted
        result.logprobs = None if params.logprobs is None else []
        result.prompt_logprobs = None if params.prompt_logprobs is None else []

    @property
    def done(self) -> bool:
        return self.result.ended

    @property
    def remaining(self) -> int:
        """How many more tokens the output may take."""
        return self.max_tokens - len(self.result.token_ids)

    def push(self, output: RoundOutput) -> list[int]:
        """Take a round's tokens up to the one that ends the output; returns them."""
        result, taken, stops = self.result, output.token_ids, False
        if self._watched or output.complete_after is not None or not self.stop_token_ids.isdisjoint(taken):
            taken, stops = self._taken(output)
        result.token_ids += taken
        plain = not output.drafted and len(taken) == 1
        result.rounds.append(
            PLAIN_ROUND if plain else RoundStats(output.drafted, min(output.accepted, len(taken)), len(taken))
        )
        if output.logprobs is not None:
            self._push_logprobs(output, output.logprobs, len(taken))
        if stops:
            result.finish_reason = "stop"
        assert len(result.token_ids) <= self.max_tokens, "the round was asked for fewer drafts than tokens remain"
        result.ended = stops or len(result.token_ids) == self.max_tokens
        return taken

    def _taken(self, output: RoundOutput) -> tuple[list[int], bool]:
        """The tokens up to the first that ends the output, and whether one does."""
        if not self.max_tokens:
            return [], False  # the prompt alone was wanted
        token_ids = output.token_ids[: output.complete_after]
        for count, token_id in enumerate(token_ids, start=1):
            if self._text is not None:
                self._text.push([token_id])
            if token_id in self.stop_token_ids or (self._text is not None and self._text.stopped):
                return token_ids[:count], True
        return token_ids, len(token_ids) == output.complete_after

    def _push_logprobs(self, output: RoundOutput, found: TopLogprobs, taken: int) -> None:
        assert self.result.logprobs is not None
        chosen, ids, tops = (t.tolist() for t in (found.chosen_R, found.token_ids_RN, found.top_RN))
        for row in range(taken):
            top = tuple(zip(ids[row], tops[row], strict=True))
            self.result.logprobs.append(TokenLogprob(output.token_ids[row], chosen[row], top))
