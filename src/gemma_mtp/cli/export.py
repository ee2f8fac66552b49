"""`gemma-mtp export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gemma_mtp.cli.progress import progress


class Format(StrEnum):
    """What is exported to."""

    GGUF = "gguf"


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A target's or drafter's checkpoint directory or GGUF file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    to: Annotated[Format, typer.Option("--to", help="The format.")] = Format.GGUF,
    kind: Annotated[
        str, typer.Option("--type", help="What matrices are written as: F32, F16, BF16, Q8_0 or Q4_0.", metavar="TYPE")
    ] = "BF16",
    tokenizer: Annotated[
        Path | None, typer.Option(help="A checkpoint whose tokenizer goes along, for a drafter that has none.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse to write where anything is lost.")] = False,
) -> None:
    """Write a target or a drafter as one file for other programs: GGUF for llama.cpp and what is built on it.

    Tokenizer, chat template, special tokens and sampling defaults go along. What the file does not hold as it was is
    said. The file is read again before it has its name.
    """
    from gemma_mtp.checkpoint import open_source
    from gemma_mtp.interop.gguf import export_gguf

    with progress("exporting"):
        words = {} if tokenizer is None else {"tokenizer": open_source(tokenizer).tokenizer()}
        made = export_gguf(checkpoint, out, kind.upper(), **words, strict=strict)
    types = ", ".join(f"{count} tensors of {dtype}" for dtype, count in sorted(made.types.items()))
    print(f"{out}: {to.value}, {types}, {made.nbytes / 1e6:.1f} MB")
