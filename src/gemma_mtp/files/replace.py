"""Files and directories written whole or not at all, with the permissions that the umask gives."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from gemma_mtp.errors import CheckpointError


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it to `path`; nothing is left where either fails.

    The file has the permissions that the umask gives a new one, whatever `write` does. Raises CheckpointError.
    """
    # others may write the same file; in containers they have the same process number
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
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
        raise _unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """The same of a UTF-8 text."""
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill beside `path`, renamed to it at the end, or removed where filling it fails.

    Raises CheckpointError where `path` is there already and no empty directory, where another run is writing it, or
    where it can not be written.
    """
    whole = path.resolve()
    _check_new(path)
    partial = whole.with_name(f".{whole.name}.partial")
    with claimed(path, whole.with_name(f".{whole.name}.lock")):
        _check_new(path)  # the other run may have come to its end in between
        try:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            partial.mkdir()
            yield partial
            partial.replace(whole)
        except OSError as error:
            raise _unwritable(path, error) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def claimed(path: Path, at: Path) -> Iterator[None]:
    """Inside, no other run claims `path` by the file `at`, which is there meanwhile. One that is killed lets go of it.

    Raises CheckpointError where another run has it, or `at` can not be written.
    """
    from filelock import FileLock, Timeout  # a twentieth of a second, which completion does without

    lock, made = FileLock(at, timeout=0), [parent for parent in at.parents if not parent.exists()]
    try:
        _make_directory(at.parent)
        at.touch()  # the lock would wait where no file can be made
        lock.acquire()
    except Timeout:
        raise CheckpointError(f"another run is writing {path}; wait for its end, or give another --out.") from None
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            at.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # those with something in them stay
            for directory in made:
                directory.rmdir()


def _check_new(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} is there already and is no empty directory; give a new one.")
    if os.path.ismount(path.resolve()):  # which nothing can be renamed to
        raise CheckpointError(f"{path} is a file system of its own; give a new directory in it.")


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} can not be written: {error.strerror or error}.")


def _make_directory(path: Path) -> None:
    """Makes it with those above it. Raises NotADirectoryError where a file is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from None


def _permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
