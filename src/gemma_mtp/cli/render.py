"""How results are printed: statistics, comparisons, coloured drafts, JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from gemma_mtp.cli.console import plain_table, print_table, say
from gemma_mtp.engine.result import FinishReason, GenerationResult, TokenKind, token_kinds
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.units import counted

ShownKind = Literal["first", "accepted", "corrected", "bonus"]
#: what is shown of how a token came about
SHOWN: dict[TokenKind, ShownKind] = {
    "first": "first", "draft": "accepted", "correction": "corrected", "plain": "corrected", "bonus": "bonus",
}  # fmt: skip
#: style, and the marks that stand in for it where there are no colours
KINDS: dict[ShownKind, tuple[str, str, str]] = {
    "first": ("dim", "", ""),
    "accepted": ("green", "", ""),
    "corrected": ("bold red", "[", "]"),
    "bonus": ("bold cyan", "{", "}"),
}
#: why an output ended
ENDS: dict[FinishReason, str] = {
    "stop": "a stop condition (stop)", "length": "the length limit (length)", "cancelled": "a cancellation",
}  # fmt: skip
EXPLANATIONS: dict[ShownKind, str] = {
    "first": "from the prefill",
    "accepted": "drafted, and what the target would have said",
    "corrected": "the target's own token where it refused a draft, or where none was made",
    "bonus": "the target's own token after a fully accepted draft",
}


def shown_kinds(result: GenerationResult) -> Iterator[ShownKind]:
    """How each output token came about, in order."""
    for i, round_ in enumerate(result.rounds):
        for kind in token_kinds(round_, first=i == 0):
            yield SHOWN[kind]


def token_texts(result: GenerationResult, tokenizer: Tokenizer | None) -> list[str]:
    """The text each token adds; a character split over tokens comes with its last one."""
    if tokenizer is None:
        return [f"{token_id} " for token_id in result.token_ids]
    decoder = tokenizer.stream()
    texts = [decoder.push([token_id]) for token_id in result.token_ids]
    return [*texts[:-1], texts[-1] + decoder.flush()] if texts else []


def print_prompt(console: Console, prompt: str | Sequence[int]) -> None:
    """A prompt of text, dimly, on a terminal with colours: the output goes on right after it. Else nothing."""
    if isinstance(prompt, str) and console.is_terminal and console.color_system is not None:
        console.print(Text(prompt, style="dim"), highlight=False, soft_wrap=True, end="")


def print_drafts(console: Console, result: GenerationResult, tokenizer: Tokenizer | None) -> None:
    """The output with every token coloured by its kind, and a legend with counts."""
    coloured = console.color_system is not None
    kinds = list(shown_kinds(result))
    text = Text()
    for kind, piece in zip(kinds, token_texts(result, tokenizer), strict=True):
        style, before, after = KINDS[kind]
        text.append(piece if coloured else f"{before}{piece}{after}", style=style)
    console.print(text, highlight=False, soft_wrap=True)
    console.print()
    for kind, explanation in EXPLANATIONS.items():
        style, before, after = KINDS[kind]
        name = kind if coloured else f"{before}{kind}{after}"
        line = Text.assemble((f"{name:>11}", style), f" {kinds.count(kind):5d}  {explanation}")
        console.print(line, soft_wrap=True)


def summary(result: GenerationResult) -> str:
    """One line: tokens, why they ended, time, speed, and what drafting did."""
    tokens, rounds = len(result.token_ids), len(result.decode_rounds)
    line = (
        f"{counted(tokens, 'token')}, ended by {ENDS[result.finish_reason]}, prefill"
        f" {result.prefill_seconds:.2f} s, decode {result.decode_seconds:.2f} s"
        f" ({result.tokens_per_second:.1f} tokens/s)"
    )
    if not result.drafted:
        return f"{line}, no drafts"
    share = result.accepted / result.drafted
    return (
        f"{line}, {rounds} rounds of {_drafts(result)}, {share:.0%} accepted,"
        f" mean acceptance length {result.mean_acceptance_length:.2f}"
    )


def _drafts(result: GenerationResult) -> str:
    if result.draft_tokens == "auto":
        return f"auto drafts ({draft_lengths(result)})"
    return f"{result.draft_tokens} drafts"


def draft_lengths(result: GenerationResult) -> str:
    """How many drafts the rounds made: on average, and in how many rounds each number."""
    average = result.drafted / max(1, len(result.decode_rounds))
    lengths = ", ".join(f"{k}: {rounds}" for k, rounds in result.rounds_by_drafts.items())
    return f"{average:.1f} on average; rounds by drafts {lengths}"


def to_json(result: GenerationResult) -> dict[str, Any]:
    """The object `--json` prints."""
    content: dict[str, Any] = {
        "prompt_token_ids": result.prompt_token_ids,
        "token_ids": result.token_ids,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "draft_tokens": result.draft_tokens,
        "verification": result.verification,
        "rounds": len(result.decode_rounds),
        "rounds_by_drafts": {str(k): rounds for k, rounds in result.rounds_by_drafts.items()},
        "drafted": result.drafted,
        "accepted": result.accepted,
        "accepted_by_position": result.accepted_by_position,
        "mean_acceptance_length": result.mean_acceptance_length,
        "prefill_seconds": result.prefill_seconds,
        "decode_seconds": result.decode_seconds,
        "tokens_per_second": result.tokens_per_second,
    }
    if result.begin is not None:
        content["thought"] = result.thought
    if result.logprobs is not None:
        content["logprobs"] = [
            {"token_id": entry.token_id, "logprob": entry.logprob, "top": [list(pair) for pair in entry.top]}
            for entry in result.logprobs
        ]
    return content


def speed(results: Sequence[GenerationResult]) -> float:
    """Median decode speed, tokens/s."""
    return statistics.median(result.tokens_per_second for result in results)


def comparison(plain: Sequence[GenerationResult], drafted: Sequence[GenerationResult]) -> dict[str, Any]:
    """Both speeds, their ratio, and whether every run gave the same tokens."""
    outputs = [result.token_ids for result in (*plain, *drafted)]
    slow, fast = speed(plain), speed(drafted)
    return {
        "plain_tokens_per_second": slow,
        "drafted_tokens_per_second": fast,
        "ratio": fast / slow if slow else 0.0,
        "identical": all(output == outputs[0] for output in outputs),
    }


def print_comparison(console: Console, plain: Sequence[GenerationResult], drafted: Sequence[GenerationResult]) -> None:
    """A table of both sides, the ratio, and the verdict."""
    compared = comparison(plain, drafted)
    table = plain_table("", "tokens/s", "tokens a round", "rounds")
    for name, results in (("without drafter", plain), ("with drafter", drafted)):
        first = results[0]
        length = f"{first.mean_acceptance_length:.2f}"
        table.add_row(name, f"{speed(results):.1f}", length, str(len(first.decode_rounds)))
    print_table(console, table)
    say(console, f"drafts a round: {draft_lengths(drafted[0])}")
    say(
        console,
        f"ratio {compared['ratio']:.2f}x (decode, median of {len(plain)}, interleaved, K = {drafted[0].draft_tokens},"
        f" {drafted[0].verification} verification); identical output: {'yes' if compared['identical'] else 'NO'}",
    )
