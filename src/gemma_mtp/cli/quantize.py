"""`gemma-mtp quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma_mtp.cli import options
from gemma_mtp.weight_types import parse_weight_types


def quantize(
    directory: Annotated[Path, typer.Argument(help="A target's or drafter's checkpoint directory or GGUF file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new directory for the quantised copy.")],
    kinds: Annotated[
        str,
        typer.Option("--quantize", help="int8, int4 or q8_0, or by part, as for generate --quantize.", metavar="KINDS"),
    ] = "int8",
    adapter: Annotated[Path | None, typer.Option(help=options.ADAPTER)] = None,
    strict: options.Strict = False,
) -> None:
    """Write a quantised copy of a checkpoint, for gemma-mtp alone. `export` writes for other programs.

    The copy gives the same output as quantising while loading, bit for bit.
    """
    from gemma_mtp.checkpoint.open import open_source
    from gemma_mtp.checkpoint.quantised_copy import write_quantised_copy
    from gemma_mtp.checkpoint.tensors import Int4Changes
    from gemma_mtp.measure.memory import inspect_checkpoint
    from gemma_mtp.progress import Display
    from gemma_mtp.units import shown_bytes

    source = open_source(directory, adapter=adapter)
    before, changes = inspect_checkpoint(source), Int4Changes()
    types = parse_weight_types(kinds)
    with Display("quantising") as display:
        made = write_quantised_copy(source, out, types, strict, display.show_bytes, changes)
    after = inspect_checkpoint(out)
    parts = ", ".join(f"{part} {kind}" for part, kind in made.quantised.items())
    print(f"{out}: {parts}; {shown_bytes(before.weight_bytes)} became {shown_bytes(after.weight_bytes)}")
    if changes.values:
        print(changes)
