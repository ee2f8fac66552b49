"""How answers are shown: text as it comes, thoughts dimmed and apart, tokens coloured by how they came about."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import COLOR_SYSTEMS
from rich.style import Style

from gemma_mtp.cli import render
from gemma_mtp.cli.chat_session import Answer, Piece
from gemma_mtp.cli.console import console
from gemma_mtp.cli.progress import progress
from gemma_mtp.engine.result import GenerationResult
from gemma_mtp.units import counted

THOUGHT_STYLE = "dim italic"


class Screen:
    """Answers go to standard output, all else to standard error. Thoughts, too, where there are no colours to tell them
    by; they are left out there if `quiet`."""

    def __init__(self, drafts: bool = False, quiet: bool = False) -> None:
        shown = console()
        self._colours = COLOR_SYSTEMS[shown.color_system] if shown.color_system is not None else None
        self.drafts, self.quiet = drafts, quiet

    def tell(self, text: str) -> None:
        """Something that is no answer."""
        print(text, file=sys.stderr, flush=True)

    def show(self, answer: Answer, stopped: Callable[[], bool]) -> None:
        """An answer as it comes, and what it took."""
        pieces = answer.pieces(stopped)
        with progress("reading the conversation"):
            piece = next(pieces, None)
        thinking = False
        while piece is not None:
            if thinking and not piece.thought:
                self._end_thought()
            thinking = piece.thought
            self._show(piece)
            piece = next(pieces, None)
        if thinking:
            self._end_thought()
        print(flush=True)
        if not self.quiet:
            self.tell(statistics(answer.result, answer.cached_tokens))
        if answer.fills_context:
            self.tell("The context is full: /drop leaves out the oldest turn, /reset begins anew.")

    def _show(self, piece: Piece) -> None:
        before, style, after = "", "", ""
        if self.drafts:
            style, before, after = render.KINDS[render.SHOWN[piece.kind]]
        if self._colours is not None:
            style = f"{style} {THOUGHT_STYLE}" if piece.thought else style
            shown = Style.parse(style).render(piece.text, color_system=self._colours) if style else piece.text
            print(shown, end="", flush=True)
        elif not piece.thought:
            print(before, piece.text, after, sep="", end="", flush=True)
        elif not self.quiet:
            print(before, piece.text, after, sep="", end="", file=sys.stderr, flush=True)

    def _end_thought(self) -> None:
        if self._colours is not None:
            print("\n", flush=True)
        elif not self.quiet:
            print(file=sys.stderr, flush=True)


def statistics(result: GenerationResult, cached_tokens: int) -> str:
    """One line: speed, drafts, what was not read again, and why the answer ended if not by itself."""
    tokens, prompt = len(result.token_ids), len(result.prompt_token_ids)
    line = f"{counted(tokens, 'token')}, {result.tokens_per_second:.1f} tokens/s"
    if result.drafted:
        line += f", {result.accepted} of {result.drafted} drafts accepted"
    if result.decode_rounds:
        line += f", {result.mean_acceptance_length:.2f} tokens a round"
    line += f"; {cached_tokens} of {prompt} prompt tokens cached, the rest read in {result.prefill_seconds:.2f} s"
    return line if result.finish_reason == "stop" else f"{line}; ended by {render.ENDS[result.finish_reason]}"
