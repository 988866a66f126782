"""Files that a user names: there and a file, or one line that says what is."""

from __future__ import annotations

from pathlib import Path

from jmp_train.errors import nearest


def check_file(path: Path, kind: str) -> None:
    """Refuses what is no regular file.

    Args:
      path: what the user named.
      kind: what was expected: an ending, such as ".npz", or a word, such as "text", where any will
        do; the files of that kind are offered where there is none of that name.

    Raises:
      ValueError: naming the path and the nearest file beside it.
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
    hint = nearest(path.name, names) if names else f"its folder holds no {kind} file"
    if len(names) > 20 and not hint.startswith("did you mean"):
        hint = f"its folder holds {len(names)} {kind} files, none of a name like it"
    raise ValueError(f"{path} does not exist; {hint}")
