"""Continuous batching: many requests decode together, one round of all of them at a time.

A thread of the engine's own plays steps while there is work. A step is one round of every running sequence, each with
drafts, seed and parameters of its own, and a chunk of the prompts that are being read, in one call of the target.
Requests come from any thread and are answered by `Generation`s.

Every output is that of a lone run, bit for bit on a CPU: no row depends on the rows beside it, and blocks of keys and
values that are shared, or computed again after a preemption, hold the same bits.
"""

from __future__ import annotations

import copy
import gc
import heapq
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor

from gemma_mtp.config import FULL, SLIDING, LayerType
from gemma_mtp.decoding.draft import Drafts
from gemma_mtp.decoding.draft_length import LEAST_GAIN, PLAIN, DraftLength, Plan
from gemma_mtp.decoding.round import (
    CHUNK_ROWS,
    NATIVE_CHUNK_ROWS,
    RoundOutput,
    Rows,
    Sequence,
    Turn,
    begin_prompt,
    conclude,
    end_prompt,
    forward_rows,
    open_sequence,
    propose,
    score_rows,
    verify_rows,
)
from gemma_mtp.decoding.round_costs import LONGEST
from gemma_mtp.decoding.sampling import ChoiceKind
from gemma_mtp.engine.output import OutputBuilder
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.request import Generation, Request
from gemma_mtp.engine.result import GenerationResult
from gemma_mtp.errors import EngineError, PromptError, QueueFullError, SamplingError
from gemma_mtp.kv_cache import BLOCK_ROWS, KVPool, OutOfBlocksError, block_bytes, block_counts
from gemma_mtp.model.layers import Rope, rope_for

log = logging.getLogger(__name__)

#: weight of a step against the ones before it, in what a row of a step takes
ROW_SECONDS_WEIGHT = 0.2


@dataclass(frozen=True)
class EngineSettings:
    """Limits of an engine.

    max_running         sequences that decode together
    max_waiting         requests that may wait beside them; one more is refused with QueueFullError
    max_tokens          prompt and output of one request together; None: the model's context
    kv_memory_mb        megabytes of keys and values of all sequences; None: room for `max_running` requests of a
                        quarter of `max_tokens` each
    max_stall_seconds   how long a prompt may keep the running sequences from their next round, about
    prefix_reuse        keep the keys and values of prompts for later prompts that begin alike
    """

    max_running: int = 16
    max_waiting: int = 256
    max_tokens: int | None = None
    kv_memory_mb: float | None = None
    max_stall_seconds: float = 0.05
    prefix_reuse: bool = True


@dataclass
class EngineStats:
    """Counters since the start, and how things stand now."""

    running: int = 0
    waiting: int = 0
    kv_blocks: int = 0
    kv_blocks_used: int = 0  # by running sequences
    kv_blocks_kept: int = 0  # for prompts to come, and given up when others need them
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0  # of them, taken from an earlier request's blocks
    output_tokens: int = 0
    steps: int = 0
    rounds: int = 0  # of single sequences
    draft_tokens: int = 0
    accepted_tokens: int = 0
    drafted_at: Counter[int] = field(default_factory=Counter)  # position in the round, from 0 -> drafts made there
    accepted_at: Counter[int] = field(default_factory=Counter)
    preemptions: int = 0
    finished: Counter[str] = field(default_factory=Counter)  # stop, length, cancelled, error


@dataclass(eq=False)
class Job:
    """A request that waits or runs. Its sequence outlives a preemption, without its keys and values."""

    generation: Generation
    order: tuple[int, int]  # priority, arrival: who comes first
    output: OutputBuilder
    tokens: list[int]  # prompt and committed output
    fixed: Plan
    policies: dict[ChoiceKind, DraftLength] = field(default_factory=dict)  # while it runs alone
    sequence: Sequence | None = None
    plain: Turn | None = None  # a round without drafts
    admitted: bool = False  # whether it has run at all
    reading: bool = True  # whether rows are missing in the cache before rounds can be played
    started: bool = False  # whether the first output token is there

    def __lt__(self, other: Job) -> bool:
        return self.order < other.order

    @property
    def result(self) -> GenerationResult:
        return self.generation.result

    @property
    def rows_wanted(self) -> int:
        """Rows that must be in the cache before rounds are played: the last committed token's comes with a round."""
        return len(self.tokens) - self.started


@dataclass
class Step:
    """What is played together: jobs with a round to play, and jobs with a chunk of their tokens to read."""

    players: list[Job] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)  # theirs, in the same order
    readers: list[Job] = field(default_factory=list)
    chunks: list[Rows] = field(default_factory=list)  # theirs
    #: of `auto` draft lengths, by how rounds choose; None where drafting can not pay
    policies: dict[ChoiceKind, DraftLength | None] = field(default_factory=dict)
    plans: dict[ChoiceKind, Plan] = field(default_factory=dict)


class Engine:
    """Decodes requests of one pair together. Thread-safe; start it with `start` or as a context manager.

    Raises EngineError where the memory for keys and values does not hold one request.
    """

    def __init__(self, pair: Pair, settings: EngineSettings | None = None) -> None:
        self.pair = pair
        self.settings = settings or EngineSettings()
        context = pair.target.config.max_position_embeddings
        self.max_tokens = min(context, self.settings.max_tokens or context)
        self._chunk_rows = CHUNK_ROWS if pair.target.native is None else NATIVE_CHUNK_ROWS
        self.pool = self._make_pool()
        self._rope: Mapping[LayerType, Rope] = {}
        self._rope_rows = 0
        self._condition = threading.Condition()  # of a lock that its owner may take again
        self._arrivals = itertools.count()
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._cancelled: set[Generation] = set()
        self._stats = EngineStats()
        self._row_seconds = 0.0
        self._ran_lately = 0  # sequences, those that read their prompts too
        self._policies: dict[ChoiceKind, DraftLength] = {}  # of sequences that run together
        self._step_began: float | None = None  # seconds of `time.monotonic`
        self._stopping = False
        self._froze = False  # what was in memory at the start
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to play steps, in a thread of the engine's own.

        What is in memory by now, models and modules, is kept out of the garbage collector's sight until `stop`: to look
        through it takes a tenth of a second and more, for which every running sequence would wait, again and again.
        """
        assert self._thread is None
        self._froze = gc.get_freeze_count() == 0
        if self._froze:
            gc.freeze()
        self._thread = threading.Thread(target=self._loop, name="gemma-mtp-engine", daemon=True)
        self._thread.start()

    def warm_up(self) -> None:
        """Measure what rounds of every number of sequences cost, which the first requests would wait for."""
        if self.pair.drafter is not None:
            for choice in get_args(ChoiceKind):
                for count in {_batch_size(n) for n in range(1, self.settings.max_running + 1)}:
                    self.pair.round_costs(choice, count)

    def submit(self, request: Request) -> Generation:
        """Queue a request.

        Raises PromptError, SamplingError, TokenizerError where it can not run, QueueFullError, and EngineError where
        the engine is stopping.
        """
        prompt = self.pair.encode(request.prompt_token_ids)
        if len(prompt) >= self.max_tokens:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens, but a request may have at most {self.max_tokens}, output"
                " included; shorten it."
            )
        self.pair.check(request.params, request.draft_tokens, request.verification)
        if not isinstance(request.priority, int):  # else it could not be compared with those that wait
            raise SamplingError(f"priority is {request.priority!r}, but must be a whole number.")
        drafts = request.draft_tokens if self.pair.drafter is not None else 0
        result = self.pair.new_result(prompt, request.params, drafts, request.verification)
        generation = Generation(request, result, self._cancel)
        limit = min(request.params.max_tokens, self.max_tokens - len(prompt))
        output = OutputBuilder(result, request.params, limit, self.pair.eos_token_ids)
        fixed = Plan(LONGEST) if drafts == "auto" else Plan(drafts)
        with self._condition:
            if self._stopping:
                raise EngineError("the engine is stopping and takes no more requests; send it to another one.")
            if len(self._waiting) >= self.settings.max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} requests are waiting already, which is as many as may; try again later."
                )
            order = request.priority, next(self._arrivals)
            heapq.heappush(self._waiting, Job(generation, order, output, list(prompt), fixed))
            self._condition.notify_all()
        return generation

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let those that are here go on for so long, cancel the rest and end the thread."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._running and not self._waiting, drain_seconds)
            self._cancelled.update(job.generation for job in (*self._waiting, *self._running))
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()
            if self._froze:
                gc.unfreeze()
                self._froze = False  # may be stopped again, when others have frozen theirs

    @property
    def alive(self) -> bool:
        """Whether the thread runs that plays steps."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def step_seconds(self) -> float:
        """How long the step under way has taken so far; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def stats(self) -> EngineStats:
        """A snapshot."""
        with self._condition:
            stats = copy.deepcopy(self._stats)
            stats.running, stats.waiting = len(self._running), len(self._waiting)
            for blocks in self.pool.blocks.values():
                stats.kv_blocks += blocks.count
                stats.kv_blocks_used += blocks.count - blocks.available
                stats.kv_blocks_kept += blocks.kept
            return stats

    def _cancel(self, generation: Generation) -> None:
        with self._condition:
            self._cancelled.add(generation)
            self._condition.notify_all()

    def _make_pool(self) -> KVPool:
        target, settings = self.pair.target, self.settings
        config, element = target.config, target.compute_dtype.itemsize

        def counts(tokens: int, sequences: int) -> dict[LayerType, int]:
            of_one = block_counts(config, tokens + LONGEST + 1, self._chunk_rows)
            return {kind: sequences * count for kind, count in of_one.items()}

        def size(blocks: Mapping[LayerType, int]) -> int:
            return sum(count * block_bytes(config, kind, element) for kind, count in blocks.items())

        least, wanted = counts(self.max_tokens, 1), counts(-(-self.max_tokens // 4), settings.max_running)
        if settings.kv_memory_mb is not None:
            room = settings.kv_memory_mb * 2**20
            if room < size(least):
                raise EngineError(
                    f"{settings.kv_memory_mb:g} MB do not hold the keys and values of one request of {self.max_tokens}"
                    f" tokens, which take {size(least) / 2**20:.3g} MB; give more memory, or lower the most tokens."
                )
            share = room / size(wanted)
            wanted = {kind: int(share * count) for kind, count in wanted.items()}
            if any(wanted[kind] < least[kind] for kind in least):  # what one request needs, and the rest for the others
                spare = (room - size(least)) / size(wanted)
                wanted = {kind: least[kind] + int(spare * count) for kind, count in wanted.items()}
        blocks = {kind: max(wanted[kind], least[kind]) for kind in (SLIDING, FULL)}
        return KVPool(config, blocks, target.compute_dtype, target.embed_tokens.weight.device)

    # What follows runs in the engine's thread.

    def _loop(self) -> None:
        with torch.inference_mode():
            while True:
                with self._condition:
                    self._condition.wait_for(lambda: self._waiting or self._running or self._stopping)
                    if self._stopping and not self._waiting and not self._running:
                        return
                    self._take_cancellations()
                    self._admit()
                self._step_began = time.monotonic()
                try:
                    self._play(self._plan())
                except Exception as error:  # of the call that all share: who is in it can not go on
                    for job in list(self._running):
                        self._fail(job, error)
                self._step_began = None
                with self._condition:
                    self._stats.steps += 1
                    if not self._running:
                        self._condition.notify_all()

    def _take_cancellations(self) -> None:
        if not self._cancelled:
            return
        for jobs in (self._waiting, self._running):
            for job in [job for job in jobs if job.generation in self._cancelled]:
                jobs.remove(job)
                self._end(job, "cancelled")
                job.result.finish_reason = "cancelled"
                job.generation.update([], None, None, "cancelled")
        heapq.heapify(self._waiting)
        self._cancelled.clear()

    def _admit(self) -> None:
        """Let waiting jobs run while there are places and blocks."""
        while self._waiting and len(self._running) < self.settings.max_running:
            job = self._waiting[0]
            try:
                if not self._has_room_for(job):
                    return
            except Exception as error:
                heapq.heappop(self._waiting)
                self._fail(job, error)
                continue
            self._running.append(heapq.heappop(self._waiting))
            self._running.sort()

    def _has_room_for(self, job: Job) -> bool:
        """Whether the blocks that a job needs to be read and to play a round are there; opens its sequence."""
        self._open(job)
        assert job.sequence is not None
        cache, blocks = job.sequence.cache, self.pool.blocks
        hit = cache.adopt(job.tokens[: job.rows_wanted]) if self.settings.prefix_reuse else 0
        needed = block_counts(self.pool.config, job.rows_wanted - hit + LONGEST + 1, self._chunk_rows)
        # a block for each running sequence, lest the newcomer sends one away at once
        if self._running and any(blocks[k].available < count + len(self._running) for k, count in needed.items()):
            cache.release()
            return False
        if not job.admitted:
            job.admitted = True
            self._stats.prompt_tokens += len(job.tokens)
            self._stats.prefix_hit_tokens += hit
            job.generation.cached_tokens = hit
        return True

    def _open(self, job: Job) -> None:
        if job.sequence is not None:
            return
        request, prompt = job.generation.request, torch.tensor(job.tokens, device=self.pool.device)
        rows = len(job.tokens) + job.output.max_tokens + LONGEST + 1
        if rows > self._rope_rows:  # sequences keep the tables they began with
            self._rope_rows = min(2 * rows, self.max_tokens + LONGEST + 1)
            positions = torch.arange(self._rope_rows, device=self.pool.device)
            self._rope = rope_for(self.pool.config, positions, self.pair.target.compute_dtype)
        job.sequence = open_sequence(
            self.pair.target, len(job.tokens), job.output.max_tokens, job.fixed.longest, request.params, self.pool,
            self._rope, self.pair.grammar_state(request.params),
        )  # fmt: skip
        begin_prompt(self.pair.target, job.sequence, prompt)

    def _plan(self) -> Step:
        """Every running sequence's part in the next step, with the blocks for it."""
        step, before = Step(), self._stats.preemptions
        # falls by one a step: where some have ended others often follow, and drafts would keep those waiting
        self._ran_lately = max(len(self._running), self._ran_lately - 1)
        room = self._chunk_room(not all(job.reading for job in self._running))
        for job in tuple(self._running):
            assert job.sequence is not None
            if self._stats.preemptions != before and job not in self._running:  # sent away for one before it
                continue
            if not job.reading:
                turn = self._turn(step, job, job.sequence)
                if self._reserve(job, turn.draft_tokens + 1):
                    step.players.append(job)
                    step.turns.append(turn)
            elif room > 0:
                begin = job.sequence.cache.length
                rows = min(room, job.rows_wanted - begin)
                if self._reserve(job, rows):
                    step.readers.append(job)
                    step.chunks.append(Rows(job.sequence, job.tokens[begin : begin + rows], keep=1))
                    room -= rows
        return step

    def _chunk_room(self, others_wait: bool) -> int:
        """Rows of prompts that the next step may read."""
        if not others_wait or not self._row_seconds:
            return self._chunk_rows
        rows = int(self.settings.max_stall_seconds / self._row_seconds)
        return max(BLOCK_ROWS, min(self._chunk_rows, rows))

    def _turn(self, step: Step, job: Job, sequence: Sequence) -> Turn:
        plan = job.fixed if job.result.draft_tokens != "auto" else self._auto_plan(step, job, sequence.params.choice)
        if not plan.longest:
            if job.plain is None:
                job.plain = Turn(sequence, 0, job.generation.request.verification)
            return job.plain
        # no more rows at once than the pool has blocks for, whatever one request asks for
        drafts = min(plan.longest, job.output.remaining - 1, self._chunk_rows - 1)
        return Turn(sequence, drafts, job.generation.request.verification, plan.stop)

    def _auto_plan(self, step: Step, job: Job, choice: ChoiceKind) -> Plan:
        if choice not in step.plans:
            policy = step.policies[choice] = self._policy(job, choice)
            step.plans[choice] = PLAIN if policy is None else policy.choose()
        return step.plans[choice]

    def _policy(self, job: Job, choice: ChoiceKind) -> DraftLength | None:
        """A lone job's own; one for all that play together: each draft makes all of them wait, and what was accepted of
        the others' says at once what a new one's are worth. None where drafting can not pay."""
        costs = self.pair.round_costs(choice, _batch_size(self._ran_lately))
        together = self._ran_lately > 1
        if together and costs.best_gain() < LEAST_GAIN:
            return None
        policies = self._policies if together else job.policies
        if choice not in policies:
            policies[choice] = self.pair.draft_length(costs)
        policies[choice].use(costs, self._ran_lately)
        return policies[choice]

    def _reserve(self, job: Job, rows: int) -> bool:
        """Take the blocks for a job's rows. Where there are too few, the job that comes last, which has no part in the
        step yet, loses its own."""
        assert job.sequence is not None
        while True:
            try:
                job.sequence.cache.reserve(rows)
                return True
            except OutOfBlocksError:
                last = self._running[-1]
                self._send_away(last)
                if last is job:
                    return False

    def _send_away(self, job: Job) -> None:
        """Preempt: free the blocks and let the job wait; what it lost is computed again."""
        assert job.sequence is not None
        if self.settings.prefix_reuse:
            job.sequence.cache.name(job.tokens)
        job.sequence.cache.release()
        with self._condition:
            self._running.remove(job)
            job.reading = True
            self._stats.preemptions += 1
            heapq.heappush(self._waiting, job)

    def _play(self, step: Step) -> None:
        """One call of the target for all, then each job's own outcome; one that fails ends alone."""
        began = time.perf_counter()
        target, drafts = self.pair.target, self._drafts(step)
        drafting = time.perf_counter() - began
        calls = [verify_rows(turn, made) for turn, made in zip(step.turns, drafts, strict=True)]
        rows = [call.keep for call in calls]
        calls += step.chunks
        if not calls:
            return
        hidden_RD = forward_rows(target, calls)
        scores = score_rows(target, step.turns, rows, hidden_RD)
        played: list[tuple[Job, RoundOutput | None]] = []
        for job, turn, made, of_turn in zip(step.players, step.turns, drafts, scores, strict=True):
            try:
                played.append((job, conclude(turn, made, hidden_RD, of_turn)))
            except Exception as error:
                self._fail(job, error)
        rounds = [(job, output) for job, output in played if output is not None]
        for row, (job, chunk) in enumerate(zip(step.readers, step.chunks, strict=True), start=sum(rows)):
            try:
                played.append((job, self._read(job, chunk, hidden_RD, row)))
            except Exception as error:
                self._fail(job, error)
        seconds = time.perf_counter() - began
        self._note(sum([len(call.tokens) for call in calls]), seconds)
        self._learn(step, rounds, seconds, drafting)
        for job, output in played:
            try:
                self._deliver(job, output, seconds)
            except Exception as error:
                self._fail(job, error)
        self._count([output for _, output in played if output is not None])

    def _drafts(self, step: Step) -> list[Drafts]:
        """Every turn's drafts; a job whose drafting fails is taken out of the step."""
        target, drafter = self.pair.target, self.pair.drafter
        try:
            return propose(target, drafter, step.turns)
        except Exception:  # whose it was shows when they draft one by one
            drafts: list[Drafts] = []
            players, turns, step.players, step.turns = step.players, step.turns, [], []
            for job, turn in zip(players, turns, strict=True):
                try:
                    drafts += propose(target, drafter, [turn])
                except Exception as error:
                    self._fail(job, error)
                else:
                    step.players.append(job)
                    step.turns.append(turn)
            return drafts

    def _read(self, job: Job, chunk: Rows, hidden_RD: Tensor, row: int) -> RoundOutput | None:
        """Commit a chunk's rows, of the last of which the hidden state is that row; the first output token where a
        prompt ends."""
        sequence = chunk.sequence
        sequence.cache.commit(len(chunk.tokens))
        if self.settings.prefix_reuse:  # at once: what slides out of the window is kept if it has a name by then
            sequence.cache.name(job.tokens)
        job.reading = sequence.cache.length < job.rows_wanted
        if job.reading:
            return None
        if job.started:  # after a preemption: all tokens are there, and now the state that produced the last one
            sequence.states_RD, sequence.state = hidden_RD, row
            return None
        return end_prompt(self.pair.target, sequence, hidden_RD, row)

    def _deliver(self, job: Job, played: RoundOutput | None, seconds: float) -> None:
        """Hand a job's tokens out, and end it where it is done."""
        output = job.output
        result = output.result
        if job.started:
            result.decode_seconds += seconds
        else:
            result.prefill_seconds += seconds
        if played is None:
            return
        job.started = True
        job.tokens += played.token_ids
        token_ids = output.push(played)
        self._stats.output_tokens += len(token_ids)
        logprobs = None if result.logprobs is None else result.logprobs[len(result.logprobs) - len(token_ids) :]
        if not result.ended:
            job.generation.update(token_ids, result.rounds[-1], logprobs, None)
            return
        with self._condition:  # before the reader knows, so that who waits for the end finds the blocks free
            self._running.remove(job)
            self._end(job, result.finish_reason)
        job.generation.update(token_ids, result.rounds[-1], logprobs, result.finish_reason)

    def _count(self, played: list[RoundOutput]) -> None:
        stats = self._stats
        with self._condition:
            stats.rounds += len(played)
            for output in played:
                if output.drafted:
                    stats.draft_tokens += output.drafted
                    stats.accepted_tokens += output.accepted
                    stats.drafted_at.update(range(output.drafted))
                    stats.accepted_at.update(range(output.accepted))

    def _learn(self, step: Step, rounds: list[tuple[Job, RoundOutput]], seconds: float, drafting: float) -> None:
        """Let policies know what came of their plans."""
        for choice, policy in step.policies.items():
            if policy is None:
                continue
            planned = [
                output for job, output in rounds
                if job.result.draft_tokens == "auto" and job.generation.request.params.choice == choice
            ]  # fmt: skip
            if len(planned) == len(step.turns) + len(step.chunks):  # nobody else took part in the step
                policy.learn(planned, seconds, drafting)
            else:
                policy.learn(planned)

    def _note(self, rows: int, seconds: float) -> None:
        of_one = seconds / rows
        old = self._row_seconds or of_one
        self._row_seconds = old + ROW_SECONDS_WEIGHT * (of_one - old)

    def _fail(self, job: Job, error: Exception) -> None:
        """End a job with an error; the others go on."""
        log.error("a request failed inside the engine", exc_info=error)
        with self._condition:
            if job in self._running:
                self._running.remove(job)
            self._end(job, "error")
        job.generation.fail(EngineError(f"the request failed inside the engine: {error}; others go on."))

    def _end(self, job: Job, reason: str) -> None:
        """Free a job's blocks and count how it ended."""
        if job.sequence is not None:
            if self.settings.prefix_reuse:
                job.sequence.cache.name(job.tokens)
            job.sequence.cache.release()
        self._stats.finished[reason] += 1


def _batch_size(sequences: int) -> int:
    """The number of sequences whose costs stand for so many: the next power of two."""
    return 1 << (sequences - 1).bit_length()
