"""Files and directories written whole or not at all, with the permissions that the umask gives."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from gemma_mtp.errors import CheckpointError


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it to `path`; nothing is left where either fails.

    The file has the permissions that the umask gives a new one, whatever `write` does. Raises CheckpointError.
    """
    # other processes and threads may write the same file
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.partial")
    try:
        _make_directory(path.parent)
        partial.unlink(missing_ok=True)
        partial.touch()
        wanted = _permissions(partial)
        write(partial)
        if _permissions(partial) != wanted:  # `write` put another file there, such as a temporary one of mode 0600
            partial.chmod(wanted)
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} can not be written: {error.strerror or error}.") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill beside `path`, renamed to it at the end, or removed where filling it fails.

    Raises CheckpointError where `path` is there already and no empty directory, or can not be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} is there already and is no empty directory; give a new one.")
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} can not be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make_directory(path: Path) -> None:
    """Makes it with those above it. Raises NotADirectoryError where a file is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from None


def _permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
