"""Checks of files that a user names."""

from __future__ import annotations

import os
from pathlib import Path

from jmp_train.errors import DataError, nearest


def named(path: str) -> Path:
    """Return the path that a user named.

    Raises:
      DataError: for a name that no file has.
    """
    if not path or "\0" in path:
        raise DataError(f"the path is {path!r}; expected the name of a file or a folder")
    return Path(path)


def check_file(path: Path, kind: str) -> None:
    """Check that a path is a regular file.

    Args:
      path: path that the user gave.
      kind: an ending, such as ".npz", or a word for files of any ending, such as "text". If the
        path does not exist, the error suggests a file of this kind.

    Raises:
      DataError: if it is not, with the path and the nearest file in its folder.
    """
    try:
        if path.is_file():
            return
        if path.is_dir():
            raise DataError(f"{path} is a folder; expected a {kind} file")
        if path.exists():
            raise DataError(f"{path} is not a regular file; expected a {kind} file")
        if not path.parent.is_dir():
            raise DataError(f"{path} does not exist; its folder does not exist either")
        pattern = f"*{kind}" if kind.startswith(".") else "*"
        names = sorted(file.name for file in path.parent.glob(pattern) if file.is_file())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    hint = nearest(path.name, names) if names else f"its folder has no {kind} files"
    if len(names) > 20 and not hint.startswith("did you mean"):
        hint = f"its folder has {len(names)} {kind} files, none with a similar name"
    raise DataError(f"{path} does not exist; {hint}")


def check_folder(path: Path) -> None:
    """Check that a path is a folder.

    Raises:
      DataError: if it is not, with the path and the nearest folder beside it.
    """
    try:
        if path.is_dir():
            return
        if path.exists():
            raise DataError(f"{path} is a file; expected a folder")
        if not path.parent.is_dir():
            raise DataError(f"{path} does not exist; its folder does not exist either")
        names = sorted(p.name for p in path.parent.iterdir() if p.is_dir())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    hint = nearest(path.name, names) if names else "there are no folders beside it"
    if len(names) > 20 and not hint.startswith("did you mean"):
        hint = f"there are {len(names)} folders beside it, none with a similar name"
    raise DataError(f"{path} does not exist; {hint}")


def within(path: str | Path, root: str | Path) -> bool:
    """Return whether a path, with symbolic links followed, is inside a folder.

    >>> within("data/../data/x", "data"), within("data/../x", "data"), within("database/x", "data")
    (True, False, False)
    """
    place, inside = os.path.realpath(root), os.path.realpath(path)
    return os.path.commonpath([place, inside]) == place


def available_memory() -> int | None:
    """Return the bytes available without swapping; None if the system does not report them."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def check_memory(path: Path, need: int, hint: str = "") -> None:
    """Raise DataError for a file whose arrays need more bytes than are free.

    Args:
      path: the file, or a folder of files.
      need: number of bytes.
      hint: what to do then, for the end of the message.
    """
    available = available_memory()
    if available is not None and need > available:
        raise DataError(
            f"{path} needs {need / 2**30:.3g} GiB of memory; expected at most the "
            f"{available / 2**30:.3g} GiB that are free{'; ' if hint else ''}{hint}"
        )
