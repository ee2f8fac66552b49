"""A request under way inside the engine: what the scheduler sees, what decoding holds, and who waits for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from gemma_mtp.decoding.draft_length import PLAIN, Plan
from gemma_mtp.decoding.params import ChoiceKind
from gemma_mtp.engine.draft_policy import Policies
from gemma_mtp.engine.execution import Chunk
from gemma_mtp.engine.output import OutputBuilder
from gemma_mtp.engine.request import Generation, Request
from gemma_mtp.engine.result import GenerationResult, PromptLogprob
from gemma_mtp.engine.round import RoundOutput
from gemma_mtp.engine.scheduler import Entry
from gemma_mtp.engine.sequence import Sequence, Turn
from gemma_mtp.kv.pool import KVCache


@dataclass(eq=False, slots=True, kw_only=True)
class Job(Entry):
    """One request. `sequence` is there from the first admission on, and outlives a preemption."""

    generation: Generation
    request: Request = field(init=False)
    result: GenerationResult = field(init=False)
    cache: KVCache
    output: OutputBuilder
    fixed_plan: Plan | None  # of a job that asked for a number of drafts; None for `auto`
    policies: Policies = field(default_factory=dict)  # of its own, for steps in which it runs alone
    plan: Plan = PLAIN  # of the step under way
    sequence: Sequence | None = None
    plain: Turn | None = None  # a round without drafts

    def __post_init__(self) -> None:
        self.request, self.result = self.generation.request, self.generation.result

    @property
    def choice(self) -> ChoiceKind:
        """How its rounds choose."""
        assert self.sequence is not None, "who runs was opened"
        return self.sequence.choice

    def turn(self) -> Turn:
        """Returns its part in a round."""
        assert self.sequence is not None, "who runs was opened"
        if self.drafts:
            return Turn(self.sequence, self.drafts, self.request.verification, self.plan.stop)
        if self.plain is None:  # made once: there are many
            self.plain = Turn(self.sequence, 0, self.request.verification)
        return self.plain

    def chunk(self, token_ids: list[int]) -> Chunk:
        """Returns its part in a step that reads these tokens."""
        assert self.sequence is not None, "who runs was opened"
        begin, rows, scored = self.table.length, len(token_ids), None
        if self.result.prompt_logprobs is not None and not self.started:
            scored = self.result.prompt_token_ids[begin + 1 : begin + 1 + rows]
        return Chunk(self.sequence, token_ids, begin + rows == self.rows_wanted, self.started, scored)

    def take_scores(self, scores: list[PromptLogprob], rows: int) -> None:
        """Take those of the rows that were just read, which come again after a preemption."""
        found, begin = self.result.prompt_logprobs, self.table.length - rows
        assert found is not None and begin <= len(found)
        found[begin : begin + len(scores)] = scores

    def deliver(self, output: RoundOutput | None, seconds: float) -> list[int]:
        """Take what a step brought into the result. Returns the tokens of it that are part of the output."""
        result = self.result
        if self.started:
            result.decode_seconds += seconds
        else:
            result.prefill_seconds += seconds
        if output is None:
            return []
        self.started = True
        self.tokens += output.token_ids
        return self.output.push(output)

    def tell(self, token_ids: list[int]) -> None:
        """Let the reader know of the last tokens, and of the end where it has come."""
        result = self.result
        logprobs = None if result.logprobs is None else result.logprobs[len(result.logprobs) - len(token_ids) :]
        self.generation.update(token_ids, result.rounds[-1], logprobs, result.finish_reason if result.ended else None)
