"""What `gemma-mtp score` does: run the text through the target, and print its tokens' log-probabilities."""

from __future__ import annotations

import json
import math
from typing import Any

from gemma_mtp.cli.console import console, plain_table, print_table, say
from gemma_mtp.cli.progress import progress
from gemma_mtp.cli.score import ScoredTarget, ScoreOutput, TextOptions
from gemma_mtp.decoding.params import MAX_LOGPROBS, SamplingParams
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.result import PromptLogprob
from gemma_mtp.errors import PromptError, SamplingError
from gemma_mtp.units import counted


def score(source: TextOptions, models: ScoredTarget, output: ScoreOutput) -> None:
    """Load the target, and print the scores of a text, or of its continuation alone."""
    if not 0 <= output.top <= MAX_LOGPROBS:
        raise SamplingError(f"--top is {output.top}, but must be from 0 to {MAX_LOGPROBS}.")
    params = SamplingParams(max_tokens=0, prompt_logprobs=output.top)
    pair, text = models.pair(models.target, None, use_drafter=False), source.given
    prompt = pair.encode(text + (source.continuation or ""))
    begin = 1 if source.continuation is None else _begin(pair, text, prompt)
    with progress("scoring"):
        scores = pair.generate(prompt, params, draft_tokens=0).prompt_logprobs
    assert scores is not None
    found = scores[begin - 1 :]
    if not found:
        raise PromptError("there is nothing to score: the first token of all has no probability; give more text.")
    if output.as_json:
        print(json.dumps({**summary(found), "tokens": [_token(pair, entry) for entry in found]}))
    else:
        _print(pair, found)


def _begin(pair: Pair, text: str, prompt: list[int]) -> int:
    """The place of the continuation's first token. Raises PromptError where a token is of both texts."""
    before = pair.encode(text)
    if prompt[: len(before)] != before:
        raise PromptError(
            "a token is of both the text and its continuation; move white space or letters to one of them."
        )
    return len(before)


def summary(found: list[PromptLogprob]) -> dict[str, Any]:
    """Sum and mean of the log-probabilities, natural ones, and the perplexity, which is null where it is infinite."""
    total = math.fsum(entry.logprob for entry in found)
    mean = total / len(found)
    return {
        "count": len(found), "logprob": total, "mean_logprob": mean,
        "perplexity": math.exp(-mean) if -mean < 700 else None, "greedy": all(entry.rank == 1 for entry in found),
    }  # fmt: skip


def _text(pair: Pair, token_id: int) -> str | None:
    return None if pair.tokenizer is None else pair.tokenizer.decode([token_id], skip_special_tokens=False)


def _token(pair: Pair, entry: PromptLogprob) -> dict[str, Any]:
    top = [{"id": token_id, "text": _text(pair, token_id), "logprob": logprob} for token_id, logprob in entry.top]
    fields = {"id": entry.token_id, "text": _text(pair, entry.token_id), "logprob": entry.logprob, "rank": entry.rank}
    return {**fields, "top": top} if top else fields


def _print(pair: Pair, found: list[PromptLogprob]) -> None:
    table = plain_table("logprob", "rank", words=0)
    table.add_column("token")
    for entry in found:
        table.add_row(f"{entry.logprob:.4f}", str(entry.rank), repr(_text(pair, entry.token_id)))
    out, facts = console(), summary(found)
    print_table(out, table)
    perplexity = "infinite" if facts["perplexity"] is None else f"{facts['perplexity']:.4f}"
    say(out, f"{counted(facts['count'], 'token')}, log-probability {facts['logprob']:.4f}, perplexity {perplexity}")
