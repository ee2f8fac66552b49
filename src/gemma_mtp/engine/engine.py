"""Continuous batching: many requests decode together, one step of all of them at a time.

A step is one round of every running sequence, each with drafts, seed and parameters of its own, and a chunk of the
prompts that are being read, in one call of the target. Whoever calls `step` plays it: `Pair.generate` for its one
request, `EngineThread` for a server's many.

Every output is that of a lone run, bit for bit: no row depends on the rows beside it, and blocks of keys and values
that are shared, or computed again after a preemption, hold the same bits.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Sequence as Items

import torch

from gemma_mtp.backend.base import PROCESSED
from gemma_mtp.backend.device_memory import free_for_pool
from gemma_mtp.decoding.draft_length import PLAIN, Plan
from gemma_mtp.decoding.params import ChoiceKind
from gemma_mtp.decoding.round_costs import LONGEST
from gemma_mtp.engine.draft_policy import DraftPolicy, batch_size
from gemma_mtp.engine.execution import Outcome, StepResult, run_step
from gemma_mtp.engine.job import Job
from gemma_mtp.engine.loaded import LoadedPair
from gemma_mtp.engine.output import OutputBuilder
from gemma_mtp.engine.pool_size import pool_blocks
from gemma_mtp.engine.request import Generation, Request
from gemma_mtp.engine.round import RoundOutput
from gemma_mtp.engine.scheduler import Schedule, Scheduler
from gemma_mtp.engine.sequence import open_sequence
from gemma_mtp.engine.settings import EngineSettings, EngineStats, StatsKeeper
from gemma_mtp.errors import EngineError, PromptError, SamplingError

log = logging.getLogger(__name__)


class Engine:
    """Decodes requests of one pair together. `submit` and `cancel` may be called from any thread, `step` from one.

    Raises EngineError where the memory for keys and values does not hold one request.
    """

    def __init__(self, pair: LoadedPair, settings: EngineSettings | None = None) -> None:
        self.pair = pair
        self.settings = settings or EngineSettings()
        backend, config = pair.backend, pair.target.config
        context = config.max_position_embeddings
        self.max_tokens = min(context, self.settings.max_tokens or context)
        element = backend.kv_dtype.itemsize
        workspace = backend.workspace_bytes(self.settings.max_running, self.max_tokens)
        free = free_for_pool(backend.device, workspace)
        counts = pool_blocks(config, self.settings, self.max_tokens, backend.chunk_rows, element, free, workspace)
        self.pool = backend.make_pool(counts, self.settings.max_running)
        self.scheduler: Scheduler[Job] = Scheduler(self.settings, backend.chunk_rows, config.sliding_window)
        self.policy = DraftPolicy(pair.round_costs, backend.watches_drafts, pair.policies)
        self._lock = threading.RLock()  # of the scheduler and of what is cancelled
        self._arrivals = itertools.count()
        self._cancelled: set[Generation] = set()
        self._stats = StatsKeeper()

    def warm_up(self) -> None:
        """Measure what rounds of every number of sequences cost, which the first requests would wait for."""
        if self.pair.drafter is not None:
            for choice in (*sorted(self.pair.backend.chooses), PROCESSED):
                for count in {batch_size(n) for n in range(1, self.settings.max_running + 1)}:
                    self.pair.round_costs(choice, count)

    def submit(self, request: Request) -> Generation:
        """Queue a request; returns what its output can be read from.

        Raises PromptError, SamplingError, TokenizerError where it can not run, and QueueFullError.
        """
        return self.add(self.prepare(request))

    def prepare(self, request: Request) -> Job:
        """Returns a job to `add`. It may take a while, where a grammar is compiled. Raises as `submit` does."""
        prompt = self.pair.encode(request.prompt_token_ids)
        self.pair.check(request.params, request.draft_tokens, request.verification)
        return self.job(request, prompt)

    def job(self, request: Request, prompt: list[int]) -> Job:
        """Returns a job to `add`, of a request and its prompt's token ids that the pair has checked.

        Raises PromptError where it is too long for this engine, and SamplingError for a wrong priority.
        """
        if len(prompt) >= self.max_tokens:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens, but a request may have at most {self.max_tokens}, output"
                " included; shorten it."
            )
        if not isinstance(request.priority, int):  # else it could not be compared with those that wait
            raise SamplingError(f"priority is {request.priority!r}, but must be a whole number.")
        drafts = request.draft_tokens if self.pair.drafter is not None else 0
        result = self.pair.new_result(prompt, request.params, drafts, request.verification)
        limit = min(request.params.max_tokens, self.max_tokens - len(prompt))
        output = OutputBuilder(result, request.params, limit, self.pair.eos_token_ids)
        cache = self.pool.cache(len(prompt) + limit + (LONGEST if drafts == "auto" else drafts) + 1)
        return Job(
            (request.priority, next(self._arrivals)), list(prompt), cache.table,
            scored=request.params.prompt_logprobs is not None,
            generation=Generation(request, result, self.cancel), cache=cache, output=output,
            fixed_plan=None if drafts == "auto" else Plan(drafts) if drafts else PLAIN,
        )  # fmt: skip

    def add(self, job: Job) -> Generation:
        """Queue what `prepare` made. Raises QueueFullError."""
        with self._lock:
            self.scheduler.add(job)
        return job.generation

    def cancel(self, generation: Generation) -> None:
        """End a request before the next step and free its blocks; its last update says `cancelled`."""
        with self._lock:
            self._cancelled.add(generation)

    def cancel_all(self) -> None:
        """Cancel whatever waits or runs."""
        with self._lock:
            self._cancelled.update(job.generation for job in self.scheduler.entries)

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return self.scheduler.idle

    def step(self) -> None:
        """Schedule, run, settle. Does nothing where nothing waits or runs.

        What fails in what all share ends those that run; who waits goes on.
        """
        with torch.inference_mode():
            self.play()

    def play(self) -> None:
        """`step` for who is in `torch.inference_mode` already, which takes a while to enter and to ask for."""
        began = time.perf_counter()
        try:
            schedule = self._schedule()
            jobs = [*schedule.rounds, *(job for job, _ in schedule.chunks)]
            if jobs:
                turns = [job.turn() for job in schedule.rounds]
                chunks = [job.chunk(token_ids) for job, token_ids in schedule.chunks]
                result = run_step(self.pair.backend, turns, chunks)
                self._settle(schedule, jobs, result, time.perf_counter() - began)
        except Exception as error:
            running = tuple(self.scheduler.running)
            if not running:
                raise
            for job in running:
                self._fail(job, error)

    def stats(self) -> EngineStats:
        """Returns a snapshot of the counters."""
        stats = self._stats.snapshot()
        with self._lock:
            stats.running, stats.waiting = len(self.scheduler.running), len(self.scheduler.waiting)
            for blocks in self.pool.blocks.values():
                stats.kv_blocks += blocks.count
                stats.kv_blocks_used += blocks.count - blocks.available
                stats.kv_blocks_kept += blocks.kept
        return stats

    def _schedule(self) -> Schedule[Job]:
        """Returns the next step: who is cancelled leaves, who can be admitted comes, and each has its part."""
        scheduler, policy = self.scheduler, self.policy
        with self._lock:
            self._take_cancellations()
            for job in scheduler.admit():
                self._open(job)
            running = tuple(scheduler.running)
        policy.begin_step(scheduler.ran_lately)
        for job in running:
            if not job.reading:
                job.plan = job.fixed_plan or policy.plan(job.choice, job.policies)
                job.drafts = job.plan.longest and self._drafts_of(job)
        with self._lock:
            schedule = scheduler.schedule()
            for job in schedule.preempted:
                job.cache.close()
        if schedule.preempted:
            with self._stats as stats:
                stats.preemptions += len(schedule.preempted)
        return schedule

    def _drafts_of(self, job: Job) -> int:
        """Returns the drafts of a job's round at most: no more rows at once than the pool has blocks for, whatever one
        request asks for."""
        return min(job.plan.longest, max(0, job.output.remaining - 1), self.pair.backend.chunk_rows - 1)

    def _settle(self, schedule: Schedule[Job], jobs: Items[Job], result: StepResult, seconds: float) -> None:
        """Learn from a step, hand its tokens out, and end what is done. `jobs`: those of the outcomes."""
        outcomes, players = result.outcomes, len(schedule.rounds)
        rounds = [output for output in outcomes[:players] if isinstance(output, RoundOutput)]
        rows = len(rounds) + sum([output.drafted for output in rounds])
        self.scheduler.note(max(1, rows + sum([len(token_ids) for _, token_ids in schedule.chunks])), seconds)
        if self.policy.planned:
            self._learn(schedule, outcomes, seconds, result.drafting_seconds)
        for i, (job, token_ids) in enumerate(schedule.chunks):
            if i in result.scores:
                job.take_scores(result.scores[i], len(token_ids))
            # at once: what slides out of the window is kept if it is registered
            job.reading = job.table.length < job.rows_wanted
            self.scheduler.register(job)
        delivered = [_delivered(job, outcome, seconds) for job, outcome in zip(jobs, outcomes, strict=True)]
        self._count(rounds, delivered)
        for job, outcome, brought in zip(jobs, outcomes, delivered, strict=True):
            if isinstance(brought, Exception):
                self._fail(job, brought)
                continue
            if job.result.ended:  # before the reader knows, so that who waits for the end finds the blocks free
                self._end(job, job.result.finish_reason)
            if outcome is not None:
                job.tell(brought)

    def _count(self, rounds: Items[RoundOutput], delivered: Items[list[int] | Exception]) -> None:
        with self._stats as stats:
            stats.steps += 1
            stats.output_tokens += sum([len(brought) for brought in delivered if isinstance(brought, list)])
            for output in rounds:
                stats.rounds_of[output.drafted, output.accepted] += 1

    def _learn(self, schedule: Schedule[Job], outcomes: Items[Outcome], seconds: float, drafting: float) -> None:
        """Let the policies know what came of their plans."""
        planned: dict[ChoiceKind, list[RoundOutput]] = {}
        for job, outcome in zip(schedule.rounds, outcomes, strict=False):
            if isinstance(outcome, RoundOutput) and job.fixed_plan is None:
                planned.setdefault(job.choice, []).append(outcome)
        for choice, outputs in planned.items():
            alone = len(outputs) == len(outcomes)  # nobody else took part in the step
            self.policy.learn(choice, outputs, *((seconds, drafting) if alone else (0.0, 0.0)))

    def _open(self, job: Job) -> None:
        """Give an admitted job what decoding holds; one that can not be opened ends."""
        params = job.request.params
        try:
            job.cache.open()
            if job.sequence is None:
                grammar = self.pair.grammar_state(params)
                end = len(job.tokens) + job.output.remaining
                job.sequence = open_sequence(self.pair.backend, job.cache, params, job.tokens, grammar, end)
        except Exception as error:
            self._fail(job, error)
            return
        if not job.admitted:
            job.admitted = True
            job.generation.admit(job.reused)
            with self._stats as stats:
                stats.prompt_tokens += len(job.tokens)
                stats.prefix_hit_tokens += job.reused

    def _take_cancellations(self) -> None:
        if not self._cancelled:
            return
        for job in [job for job in self.scheduler.entries if job.generation in self._cancelled]:
            self._end(job, "cancelled")
            job.result.finish_reason = "cancelled"
            job.generation.update([], None, None, "cancelled")
        self._cancelled.clear()

    def _fail(self, job: Job, error: Exception) -> None:
        """End a job with an error; the others go on. A SamplingError, as of a grammar that turns out to be too complex,
        is handed out as it is."""
        self._end(job, "error")
        if isinstance(error, SamplingError):
            job.generation.fail(error)
            return
        log.error("a request failed inside the engine", exc_info=error)
        failure = EngineError(f"the request failed inside the engine: {error}; others go on.")
        failure.__cause__ = error
        job.generation.fail(failure)

    def _end(self, job: Job, reason: str) -> None:
        """Free what a job holds and count how it ended."""
        with self._lock:
            self.scheduler.remove(job)
            job.cache.close()
        with self._stats as stats:
            stats.finished[reason] += 1


def _delivered(job: Job, outcome: Outcome, seconds: float) -> list[int] | Exception:
    """Returns the tokens that a job's part of a step brought, or the exception that ends the job."""
    if isinstance(outcome, Exception):
        return outcome
    try:
        return job.deliver(outcome, seconds)
    except Exception as error:
        return error
