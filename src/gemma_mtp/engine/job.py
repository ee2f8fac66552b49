"""A request under way inside the engine: what the scheduler sees, what decoding holds, and who waits for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from gemma_mtp.decoding.draft_length import PLAIN, Plan
from gemma_mtp.engine.draft_policy import Policies
from gemma_mtp.engine.output import OutputBuilder
from gemma_mtp.engine.request import Generation, Request
from gemma_mtp.engine.result import GenerationResult
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
