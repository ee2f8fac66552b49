"""Run what was scheduled: one call of the target over the rounds of many sequences and the chunks of their prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from typing import NamedTuple

from torch import Tensor

from gemma_mtp.backend.base import Backend, Rows
from gemma_mtp.engine.draft import NO_DRAFTS, Drafts, propose
from gemma_mtp.engine.result import PromptLogprob
from gemma_mtp.engine.round import RoundOutput, Scored, forward, settle, verify_rows
from gemma_mtp.engine.scoring import score
from gemma_mtp.engine.sequence import Sequence, Turn
from gemma_mtp.engine.whole_rounds import play_whole

#: what a part of a step came to: tokens, none yet, or the exception that it ended in
Outcome = RoundOutput | Exception | None


class Chunk(NamedTuple):
    """Tokens of one sequence to read. `ends`: no more are missing after them. `started`: what is read was lost by a
    preemption, and the output goes on after it; else the last row chooses the first output token. `scored`: the tokens
    after each of these, or after each but the prompt's last, whose log-probabilities are wanted; None: no scores."""

    sequence: Sequence
    token_ids: list[int]
    ends: bool
    started: bool
    scored: list[int] | None = None

    @property
    def keep(self) -> int:
        """How many of its last hidden states are wanted."""
        return 1 if self.scored is None else len(self.token_ids)


class StepResult(NamedTuple):
    """What a step came to: the outcomes of its turns, then those of its chunks, the seconds that drafting took, and, by
    place among the chunks, the log-probabilities that were wanted."""

    outcomes: list[Outcome]
    drafting_seconds: float = 0.0
    scores: dict[int, list[PromptLogprob]] = {}  # noqa: RUF012 (read only)


def run_step(backend: Backend, turns: Items[Turn], chunks: Items[Chunk]) -> StepResult:
    """Play a round of each turn and read the chunks.

    A part that fails by itself ends in its exception. What is raised came from the call that all share. Rounds that the
    backend plays as a whole are not part of that call.
    """
    if backend.rounds is None:
        return _run_call(backend, turns, chunks)
    whole = play_whole(backend, turns, chunks[0].sequence if chunks else None)
    others = [i for i, output in enumerate(whole) if output is None]
    rest = _run_call(backend, [turns[i] for i in others], chunks)
    outcomes: list[Outcome] = [*whole, *rest.outcomes[len(others) :]]
    for i, outcome in zip(others, rest.outcomes, strict=False):
        outcomes[i] = outcome
    return StepResult(outcomes, rest.drafting_seconds, rest.scores)


def _run_call(backend: Backend, turns: Items[Turn], chunks: Items[Chunk]) -> StepResult:
    """Draft for the turns, and run their rows and the chunks in one call of the target."""
    began = time.perf_counter()
    drafts = _propose(backend, turns)
    drafting = time.perf_counter() - began
    outcomes: list[Outcome] = [None] * (len(turns) + len(chunks))
    calls: list[Rows] = []
    scored: dict[int, Scored] = {}  # by place among the outcomes
    begin = 0
    for i, (turn, of_one) in enumerate(zip(turns, drafts, strict=True)):
        if isinstance(of_one, Drafts):
            scored[i] = Scored(turn, of_one, begin)
            calls.append(verify_rows(turn, of_one))
            begin += calls[-1].keep
        else:
            outcomes[i] = of_one
    calls += [Rows(chunk.sequence.cache, chunk.token_ids, chunk.keep) for chunk in chunks]
    if not calls:
        return StepResult(outcomes, drafting)
    hidden_RD = forward(backend, calls)
    ending, scores = _commit_chunks(backend, chunks, hidden_RD, begin)
    scored |= {len(turns) + i: one for i, one in ending.items()}
    for i, output in zip(scored, settle(backend, list(scored.values()), hidden_RD), strict=True):
        outcomes[i] = output
    return StepResult(outcomes, drafting, scores)


def _commit_chunks(
    backend: Backend, chunks: Items[Chunk], hidden_RD: Tensor, begin: int
) -> tuple[dict[int, Scored], dict[int, list[PromptLogprob]]]:
    """Commit chunks, of which the wanted states stand from row `begin` on.

    Returns, by place among the chunks, the prompts that end and so choose a first token, and the wanted scores.
    """
    ending, scores, resumed = dict[int, Scored](), dict[int, list[PromptLogprob]](), []
    for i, chunk in enumerate(chunks):
        if chunk.scored:
            states_RD = hidden_RD[begin : begin + len(chunk.scored)]
            scores[i] = score(backend, states_RD, chunk.scored, chunk.sequence.params.prompt_logprobs or 0)
        begin += chunk.keep
        chunk.sequence.cache.table.commit(len(chunk.token_ids))
        if chunk.ends and chunk.started:
            resumed.append((chunk.sequence.cache, begin - 1))
        elif chunk.ends:
            ending[i] = Scored(Turn(chunk.sequence, 0), NO_DRAFTS, begin - 1)
    if resumed:  # all tokens are there, and now the state that produced the last one
        backend.keep_states([cache for cache, _ in resumed], hidden_RD, [row for _, row in resumed])
    return ending, scores


def _propose(backend: Backend, turns: Items[Turn]) -> list[Drafts | Exception]:
    """Returns every turn's drafts, or the exception that its drafting ended in."""
    try:
        return list(propose(backend, turns))
    except Exception:  # whose it was shows when they draft one by one
        drafts: list[Drafts | Exception] = []
        for turn in turns:
            try:
                drafts += propose(backend, [turn])
            except Exception as error:
                drafts.append(error)
        return drafts
