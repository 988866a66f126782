"""Errors of a user's network, task or data as one line that names the place."""

from __future__ import annotations

import contextlib
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax

from jmp_train.errors import UsageError

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = tuple(
    str(folder)
    for folder in (
        _PACKAGE,
        Path(jax.__file__).resolve().parent.parent,
        Path(sysconfig.get_path("stdlib")).resolve(),
    )
)
_TASKS = str(_PACKAGE / "tasks")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an error of shapes or types, raised while the step is traced, into a UsageError.

    The message has the first line of the error and the last line of the user's own files that led to
    it. Errors of other kinds are mistakes in code, and keep their traceback.
    """
    try:
        yield
    except UsageError:  # it is one line
        raise
    except Exception as error:
        flaxs = type(error).__module__.startswith("flax")
        if not flaxs and not isinstance(error, (TypeError, ValueError)):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if not f.filename.startswith((*_LIBRARIES, "<"))]
        if not own and not frames[-1].filename.startswith(_TASKS):
            raise
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        place = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
        raise UsageError(f"the network and the data do not fit: {text}{place}") from error
