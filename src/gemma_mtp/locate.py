"""Where a checkpoint lies that was given as a directory, as `bundled`, or by its name on the Hugging Face hub.

Names are looked up in the hub's cache on this machine. Nothing is downloaded here: `gemma-mtp pull` does that.
"""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Literal

from gemma_mtp.errors import CheckpointError, missing_extra

BUNDLED = "bundled"
Role = Literal["target", "drafter"]
#: what a drafter's name has behind its target's, for QAT checkpoints too
DRAFTER_SUFFIX = "-assistant"
#: single-file drafters, as ggml-org names them: mtp-gemma-4-12B-it-Q8_0.gguf
GGUF, GGUF_DRAFTER = ".gguf", "mtp-"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def bundled_directory() -> Path:
    """Where the bundled pair lies: `target`, `drafter`, its card and the held-out prompts."""
    return Path(str(resources.files("gemma_mtp") / "bundled"))


def locate(location: str | Path, role: Role = "target") -> Path:
    """Returns the path of a checkpoint given by path or name. What exists as a path is that; a path that does not is
    returned as it is, for its reader to refuse.

    Raises CheckpointError for a hub's name whose files are not in the cache, with the command that downloads them.
    """
    path, name = Path(location), str(location)
    if path.exists():
        return path
    if name == BUNDLED:
        return bundled_directory() / role
    return cached(name) if is_hub_name(name) else path


def is_hub_name(name: str) -> bool:
    """Whether it is written as `owner/model`."""
    return HUB_NAME.fullmatch(name) is not None


def cached(name: str) -> Path:
    """Returns the directory of a model in the Hugging Face cache. Raises CheckpointError where it is not whole."""
    directory, missing = _cached_files(name)
    if directory is None:
        raise CheckpointError(
            f"there is no directory {name}, and no model of that name in the Hugging Face cache ({_cache_path()});"
            f" download it with: gemma-mtp pull {name}"
        )
    if missing is not None:
        raise CheckpointError(
            f"{name} is in the Hugging Face cache without its {missing}; download the rest with: gemma-mtp pull {name}"
        )
    return directory


def find_drafter(target: str | Path) -> str | Path | None:
    """Returns where the drafter of a target lies, by its name: the bundled one's, `NAME-assistant` in the Hugging Face
    cache, the directory of that name beside the target's, or `mtp-NAME-TYPE.gguf` beside a GGUF file. None where there
    is none. Opens nothing."""
    for place in drafter_places(target):
        if isinstance(place, Path):
            if (place / "config.json").is_file() or (place.suffix == GGUF and place.is_file()):
                return place
        elif place == BUNDLED or _whole(place):
            return place
    return None


def drafter_places(target: str | Path) -> list[str | Path]:
    """Returns the names and directories that `find_drafter` looks at."""
    path, name = Path(target), str(target)
    if not path.exists():
        if name == BUNDLED:
            return [BUNDLED]
        return [name + DRAFTER_SUFFIX] if is_hub_name(name) else []
    if path.resolve() == (bundled_directory() / "target").resolve():
        return [BUNDLED]
    if path.suffix == GGUF and path.is_file():
        return _beside_gguf(path)
    directory = path.resolve() if path.is_dir() else path.resolve().parent
    hub = _name_of_snapshot(directory)
    if hub is not None:
        return [hub + DRAFTER_SUFFIX]
    return [directory.with_name(directory.name + DRAFTER_SUFFIX)]


def _beside_gguf(target: Path) -> list[str | Path]:
    """Files of the target's name with `mtp-` before it: of the same type first, then of any other."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", target.stem)
    model = stem.rpartition("-")[0] or stem
    others = sorted(target.parent.glob(f"{GGUF_DRAFTER}*{GGUF}"))
    alike = [file for file in others if file.stem.removeprefix(GGUF_DRAFTER).rpartition("-")[0] == model]
    same = target.with_name(f"{GGUF_DRAFTER}{stem}{GGUF}")
    return [same, *(file for file in alike if file != same)]


def _name_of_snapshot(directory: Path) -> str | None:
    """The name of the model whose snapshot in the cache this directory is: .../models--OWNER--NAME/snapshots/ID."""
    repository = directory.parent.parent.name
    if directory.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/", 1)


def _whole(name: str) -> bool:
    directory, missing = _cached_files(name)
    return directory is not None and missing is None


def _cached_files(name: str) -> tuple[Path | None, str | None]:
    """A model's directory in the cache, and a file that it lacks."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        raise CheckpointError(
            f"{name} is no directory, and {missing_extra('a name on the Hugging Face hub', 'huggingface_hub', 'hub')}"
        ) from None
    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:  # a name that the hub does not allow
        return None, None
    if not isinstance(config, str):
        return None, None
    directory = Path(config).parent
    return directory, _missing_file(directory)


def _missing_file(directory: Path) -> str | None:
    if (directory / "model.safetensors").is_file():
        return None
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return "model.safetensors"
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        return index.name
    return next((name for name in names if not (directory / name).is_file()), None)


def _cache_path() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return HF_HUB_CACHE
