"""`gemma-mtp pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma_mtp.cli import options
from gemma_mtp.cli.options import MODELS


def pull(
    model: Annotated[
        str, typer.Argument(help="A model's name on the Hugging Face hub, such as google/gemma-4-E2B-it.")
    ],
    drafter: Annotated[
        str | None, typer.Option(help="Its drafter's name. Default: NAME-assistant.", rich_help_panel=MODELS)
    ] = None,
    no_drafter: Annotated[
        bool, typer.Option("--no-drafter", help="Download the model alone.", rich_help_panel=MODELS)
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(
            help="A branch, tag or commit of the model. Commands then take the directory that is printed, not the"
            " name. Default: the newest.",
            rich_help_panel=MODELS,
        ),
    ] = None,
) -> None:
    """Download a model and its drafter into the Hugging Face cache.

    Every command then takes the name, offline. Downloaded are safetensors, configurations and the tokenizer, no
    pickles. HF_ENDPOINT, HF_HOME and HF_TOKEN say from where, to where and as whom.
    """
    options.check_exclusive(drafter, no_drafter)

    from gemma_mtp.hub import download
    from gemma_mtp.locate import DRAFTER_SUFFIX

    print(f"{model}: {_shown(download(model, revision))}", flush=True)
    if no_drafter or (drafter is None and model.endswith(DRAFTER_SUFFIX)):
        return
    name = drafter or model + DRAFTER_SUFFIX
    place = download(name, None, optional=drafter is None)
    if place is None:
        print(f"{name}: there is no such model, so {model} decodes without a drafter; or give one with --drafter")
    else:
        print(f"{name}: {_shown(place)}")


def _shown(directory: Path | None) -> str:
    from gemma_mtp.units import shown_bytes

    assert directory is not None
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    return f"{shown_bytes(size)} in {directory}"
