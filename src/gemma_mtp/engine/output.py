"""Turns rounds into output: cuts at the exact token that ends it, and gives out text as it becomes certain."""

from __future__ import annotations

from collections.abc import Collection

from gemma_mtp.decoding.round import RoundOutput
from gemma_mtp.decoding.sampling import SamplingParams, TopLogprobs
from gemma_mtp.engine.result import GenerationResult, RoundStats, TokenLogprob
from gemma_mtp.tokenizer import StopMatcher, Tokenizer


class OutputBuilder:
    """Collects one sequence's committed tokens into a `GenerationResult`."""

    def __init__(
        self,
        result: GenerationResult,
        params: SamplingParams,
        max_tokens: int,
        eos_token_ids: Collection[int],
        tokenizer: Tokenizer | None,
    ) -> None:
        self.result = result
        self.max_tokens = max_tokens
        self.stop_token_ids = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        self.decoder = None if tokenizer is None else tokenizer.stream()
        self.matcher = StopMatcher(params.stop)
        self.done = False
        result.text = None if tokenizer is None else ""
        result.logprobs = None if params.logprobs is None else []

    @property
    def remaining(self) -> int:
        """How many more tokens the output may take."""
        return self.max_tokens - len(self.result.token_ids)

    def push(self, output: RoundOutput) -> str:
        """Take a round's tokens up to the one that ends the output; returns the text that became certain."""
        result, remaining = self.result, self.remaining
        assert len(output.token_ids) <= remaining, "the round was asked for fewer drafts than tokens remain"
        text, taken = "", 0
        for piece in self._pieces(output):
            result.token_ids += piece
            taken += len(piece)
            text += self._push_text(piece, taken == output.complete_after)
            if self.done:
                break
        if taken == remaining and not self.done:
            self.done = True
            text += self._flush_text()
        result.rounds.append(RoundStats(output.drafted, min(output.accepted, taken), taken))
        if output.logprobs is not None:
            self._push_logprobs(output, output.logprobs, taken)
        if result.text is not None:
            result.text += text
        return text

    def _pieces(self, output: RoundOutput) -> list[list[int]]:
        """The tokens up to the first that ends the output; one by one where a stop string may end it at any of them."""
        token_ids = output.token_ids
        if not self.matcher.stop and self.stop_token_ids.isdisjoint(token_ids):
            return [token_ids[: output.complete_after]]
        token_ids = token_ids[: output.complete_after]
        stops = [i for i, token_id in enumerate(token_ids) if token_id in self.stop_token_ids]
        kept = token_ids[: stops[0] + 1] if stops else token_ids
        return [[token_id] for token_id in kept] if self.matcher.stop else [kept]

    def _push_text(self, token_ids: list[int], complete: bool) -> str:
        text = "" if self.decoder is None else self.matcher.push(self.decoder.push(token_ids))
        if self.matcher.stopped:
            self._stop()
        elif complete or token_ids[-1] in self.stop_token_ids:
            self._stop()
            text += self._flush_text()
        return text

    def _flush_text(self) -> str:
        """Text still held back when the output ends: half characters and possible beginnings of stop strings."""
        if self.decoder is None:
            return ""
        return self.matcher.push(self.decoder.flush()) + self.matcher.flush()

    def _stop(self) -> None:
        self.done = True
        self.result.finish_reason = "stop"

    def _push_logprobs(self, output: RoundOutput, found: TopLogprobs, taken: int) -> None:
        assert self.result.logprobs is not None
        chosen, ids, tops = (t.tolist() for t in (found.chosen_R, found.token_ids_RN, found.top_RN))
        for row in range(taken):
            top = tuple(zip(ids[row], tops[row], strict=True))
            self.result.logprobs.append(TokenLogprob(output.token_ids[row], chosen[row], top))
