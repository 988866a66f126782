"""Folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from jmp_train.errors import DataError


def check_new(folder: Path) -> None:
    """Raise DataError for a path that exists, but for an empty folder, or that cannot be written."""
    try:
        if not (folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())):
            exists = os.path.lexists(folder)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.lstat(_partial(folder, os.getpid()))  # fails for a name that is too long
            if exists:
                raise DataError(f"{folder} exists; expected a new folder")
        place = next(p for p in folder.absolute().parents if os.path.lexists(p))
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise DataError(f"{folder} cannot be written: no folder can be made in {place}")
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Yield a folder to write, which gets the name of `folder` in the end, or is removed.

    What a process that was killed has left of the same folder is removed first.

    Raises:
      DataError: where it cannot be written.
    """
    place = _partial(folder, os.getpid())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(folder)
        place.mkdir()
        with _locked(place):
            yield place
            os.replace(place, folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}") from error
    except RuntimeError as error:  # of ArrayRecord's writer
        what = (str(error).strip() or "RuntimeError").splitlines()[0]
        raise DataError(f"{folder} cannot be written: {what}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _partial(folder: Path, process: int) -> Path:
    return folder.with_name(f".{folder.name}.{process}")


def _remove_left(folder: Path) -> None:
    """Remove the folders that killed processes of this machine have left.

    One is removed only if its process has ended and its lock can be taken, because another machine or
    container that shares the folder has other processes.
    """
    form = re.compile(rf"\.{re.escape(folder.name)}\.(\d{{1,9}})")
    for left in folder.parent.iterdir():
        number = form.fullmatch(left.name)
        if number is None or left.is_symlink() or not left.is_dir():
            continue
        with _locked(left) as locked:
            if locked and _has_ended(int(number[1])):
                shutil.rmtree(left, ignore_errors=True)


def _has_ended(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder while the context lasts, and say whether that was possible."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError:  # of another process, or of a file system without locks
            locked = False
        yield locked
    finally:
        os.close(descriptor)
