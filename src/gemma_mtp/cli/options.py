"""Options that several commands have, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_mtp.backend.native import set_threads
from gemma_mtp.errors import SamplingError

DATA, MODELS, DRAFTING, SAMPLING = "Data", "Models", "Drafting", "Sampling and stopping"
GRAMMAR, OUTPUT = "Constrained output", "Output"


def option(*names: str, help: str, panel: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar)


def use_threads(threads: int | None) -> None:
    """Do what `--threads` says, if it was given. Raises SamplingError below 1."""
    if threads is not None and threads < 1:
        raise SamplingError(f"--threads is {threads}, but must be 1 or more.")
    if threads is not None:
        set_threads(threads)


Target = Annotated[
    Path | None, option("--target", help="Target checkpoint directory; default: the bundled pair.", panel=MODELS)
]
Drafter = Annotated[Path | None, option("--drafter", help="Drafter checkpoint directory.", panel=MODELS)]
NoDrafter = Annotated[bool, option("--no-drafter", help="Decode without a drafter.", panel=MODELS)]
Dtype = Annotated[
    str,
    option(
        "--dtype",
        help="auto, float32, bfloat16 or float16; auto is as stored on a CPU, bfloat16 on a GPU.",
        panel=MODELS,
    ),
]
Device = Annotated[str, option("--device", help="auto, cpu, cuda or cuda:N.", panel=MODELS)]
Threads = Annotated[int | None, option("--threads", help="CPU threads; default: one for each core.", panel=MODELS)]
Strict = Annotated[
    bool,
    option(
        "--strict",
        help="Refuse a checkpoint that has what is not known, not honoured or contradictory, instead of a warning.",
        panel=MODELS,
    ),
]
Quantize = Annotated[
    str | None,
    option(
        "--quantize",
        help="Quantise while loading: int8, int4, or parts, such as target=int4,drafter=int8; the parts are target,"
        " embeddings, drafter and drafter-head.",
        panel=MODELS,
    ),
]
Verify = Annotated[
    str,
    option(
        "--verification",
        help="exact: the very tokens of plain decoding; rejection, block: the same"
        " distribution, more accepted at high temperature.",
        panel=DRAFTING,
    ),
]
