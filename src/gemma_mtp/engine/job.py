"""A request under way inside the engine: what the scheduler sees, what decoding holds, and who waits for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from gemma_mtp.decoding.draft_length import PLAIN, Plan
from gemma_mtp.engine.draft_policy import Policies
from gemma_mtp.engine.output import OutputBuilder
from gemma_mtp.engine.request import Generation, Request
from gemma_mtp.engine.result import GenerationResult, PromptLogprob
from gemma_mtp.engine.round import RoundOutput
from gemma_mtp.engine.scheduler import Entry
from gemma_mtp.engine.sequence import Sequence, Turn
from gemma_mtp.kv.pool import KVCache


@dataclass(eq=False)
class Job:
    """One request. `sequence` is there from the first admission on, and outlives a preemption."""

    generation: Generation
    entry: Entry
    cache: KVCache
    output: OutputBuilder
    policies: Policies = field(default_factory=dict)  # of its own, for steps in which it runs alone
    plan: Plan = PLAIN  # of the step under way
    sequence: Sequence | None = None
    plain: Turn | None = None  # a round without drafts

    def __post_init__(self) -> None:
        #: fields, not properties: a step asks for them many times
        self.request: Request = self.generation.request
        self.result: GenerationResult = self.generation.result
        drafts = self.result.draft_tokens
        #: the plan of a job that asked for a number of drafts; None for `auto`
        self.fixed_plan = None if drafts == "auto" else Plan(drafts)

    def turn(self, drafts: int) -> Turn:
        """Returns its part in a round of so many drafts at most."""
        assert self.sequence is not None, "who runs was opened"
        if drafts:
            return Turn(self.sequence, drafts, self.request.verification, self.plan.stop)
        if self.plain is None:  # made once: there are many
            self.plain = Turn(self.sequence, 0, self.request.verification)
        return self.plain

    def wanted_scores(self, rows: int) -> list[int] | None:
        """Returns the tokens after the next rows of the prompt, where their scores are wanted, else None."""
        if self.result.prompt_logprobs is None or self.entry.started:
            return None
        begin = self.entry.table.length
        return self.result.prompt_token_ids[begin + 1 : begin + 1 + rows]

    def take_scores(self, scores: list[PromptLogprob], rows: int) -> None:
        """Take those of the rows that were just read, which come again after a preemption."""
        found, begin = self.result.prompt_logprobs, self.entry.table.length - rows
        assert found is not None and begin <= len(found)
        found[begin : begin + len(scores)] = scores

    def deliver(self, output: RoundOutput | None, seconds: float) -> int:
        """Take what a step brought into the result. Returns how many tokens there are."""
        result, entry = self.result, self.entry
        if entry.started:
            result.decode_seconds += seconds
        else:
            result.prefill_seconds += seconds
        if output is None:
            return 0
        entry.started = True
        entry.tokens += output.token_ids
        return len(self.output.push(output))

    def tell(self, count: int) -> None:
        """Let the reader know of the last `count` tokens, and of the end where it has come."""
        result = self.result
        token_ids = result.token_ids[len(result.token_ids) - count :]
        logprobs = None if result.logprobs is None else result.logprobs[len(result.logprobs) - count :]
        self.generation.update(token_ids, result.rounds[-1], logprobs, result.finish_reason if result.ended else None)
