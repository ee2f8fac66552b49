"""`gemma-mtp export`."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gemma_mtp.cli import options


class Format(StrEnum):
    """What is exported to."""

    GGUF = "gguf"
    SAFETENSORS = "safetensors"
    COMPRESSED_TENSORS = "compressed-tensors"
    MLX = "mlx"


#: types of matrices where none is asked for; BF16 elsewhere
DEFAULTS = {Format.COMPRESSED_TENSORS: "W4A16", Format.MLX: "4BIT"}


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A target's or drafter's checkpoint directory or GGUF file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The GGUF file or the new directory to write.")],
    to: Annotated[
        Format, typer.Option("--to", help="gguf, safetensors, compressed-tensors or mlx.", metavar="FORMAT")
    ] = Format.GGUF,
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="What matrices are written as. gguf: BF16 (default), F32, F16, Q8_0, Q4_0; safetensors: BF16"
            " (default), F16, F32; compressed-tensors: W4A16 (default), W8A16, FP8; mlx: 4BIT (default), 8BIT, BF16,"
            " F16, F32.",
            metavar="TYPE",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A checkpoint whose tokenizer is written too, for a drafter that has none.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help=options.ADAPTER)] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse to write where anything is lost.")] = False,
) -> None:
    """Write a target or a drafter for other programs, with a model card.

    gguf is one file, for llama.cpp and what is built on it. The others are directories: safetensors for transformers
    and all that read its layout, compressed-tensors for vLLM and SGLang, mlx for mlx-lm.

    Tokenizer, chat template and sampling defaults are written too. What was lost is said.
    """
    from gemma_mtp.checkpoint import open_source
    from gemma_mtp.progress import Display
    from gemma_mtp.units import shown_bytes

    source, chosen = open_source(checkpoint, adapter=adapter), (kind or DEFAULTS.get(to, "BF16")).upper()
    with Display("exporting") as display:
        if to is Format.GGUF:
            from gemma_mtp.interop.gguf import export_gguf

            words = {} if tokenizer is None else {"tokenizer": open_source(tokenizer).tokenizer()}
            file = export_gguf(source, out, chosen, **words, strict=strict, on_bytes=display.show_bytes)
            held = ", ".join(f"{count} tensors of {dtype}" for dtype, count in sorted(file.types.items()))
            nbytes = file.nbytes
        else:
            from gemma_mtp.interop.directory import export_directory

            made = export_directory(
                source, out, to.value, chosen, tokenizer=tokenizer, strict=strict, on_bytes=display.show_bytes,
                on_checked=partial(display.show_bytes, name="reading again"),
            )  # fmt: skip
            held, nbytes = f"{made.floats} tensors as {chosen}", made.nbytes
            if made.packed:
                held = f"{made.packed} matrices as {chosen}, {made.floats} other tensors"
    print(f"{out}: {to.value}, {held}, {shown_bytes(nbytes)}")
