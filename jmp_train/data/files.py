"""Checks of files that a user names."""

from __future__ import annotations

from pathlib import Path

from jmp_train.errors import nearest


def check_file(path: Path, kind: str) -> None:
    """Check that a path is a regular file.

    Args:
      path: path that the user gave.
      kind: an ending, such as ".npz", or a word for files of any ending, such as "text". If the
        path does not exist, the error suggests a file of this kind.

    Raises:
      ValueError: if it is not, with the path and the nearest file in its folder.
    """
    try:
        if path.is_file():
            return
        if path.is_dir():
            raise ValueError(f"{path} is a folder; expected a {kind} file")
        if path.exists():
            raise ValueError(f"{path} is not a regular file; expected a {kind} file")
        if not path.parent.is_dir():
            raise ValueError(f"{path} does not exist; its folder does not exist either")
        pattern = f"*{kind}" if kind.startswith(".") else "*"
        names = sorted(file.name for file in path.parent.glob(pattern) if file.is_file())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    hint = nearest(path.name, names) if names else f"its folder has no {kind} files"
    if len(names) > 20 and not hint.startswith("did you mean"):
        hint = f"its folder has {len(names)} {kind} files, none with a similar name"
    raise ValueError(f"{path} does not exist; {hint}")
