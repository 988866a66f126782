"""What Orbax logs and prints about a checkpoint that it cannot load; its reader gets one line of ours."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LONGEST = 240  # characters of a cause


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Drop what Orbax logs and prints while it reads; the error that it raises says the same.

    Orbax gives up its other reads at the first error. They end later, in threads or when they are
    collected, each with a traceback, so after an error those tracebacks are dropped for good. All
    other messages stay.
    """
    absl, tasks, before = (
        logging.getLogger("absl"),
        logging.getLogger("asyncio"),
        sys.unraisablehook,
    )

    def of_others(record: logging.LogRecord) -> bool:
        return not _in_orbax(record.pathname)

    def of_other_tasks(record: logging.LogRecord) -> bool:
        if not record.exc_info:
            return True
        frames = traceback.extract_tb(record.exc_info[2])
        own = "tensorstore" in str(record.exc_info[1])  # what it reads with
        return not (own or any(_in_orbax(frame.filename) for frame in frames))

    def hook(unraisable: Any, /) -> None:
        if not _given_up(unraisable):
            before(unraisable)

    absl.addFilter(of_others)
    tasks.addFilter(of_other_tasks)
    sys.unraisablehook = hook
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            try:
                yield
            except Exception as error:
                _collect(error)
                raise
        tasks.removeFilter(of_other_tasks)
        sys.unraisablehook = before
    finally:
        absl.removeFilter(of_others)


def _collect(error: BaseException) -> None:
    """Collect the tasks and coroutines that an error keeps alive, each of which has a message."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    gc.collect()


def _given_up(unraisable: Any) -> bool:
    """Return whether an error is that of a read that Orbax gave up."""
    if unraisable.object is None:  # of TensorStore, which tells a loop that is closed already
        return str(unraisable.exc_value) == "Event loop is closed"
    code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
    return code is not None and _in_orbax(code.co_filename)


def _in_orbax(file: str) -> bool:
    return "orbax" in Path(file).parts


def cause(error: BaseException) -> str:
    """Return why a checkpoint cannot be loaded, in one short line.

    >>> cause(ValueError('Error opening "zarr3" driver: Error decoding local file "a/b": Data [tensorstore_spec]'))
    'local file "a/b": Data'
    >>> cause(KeyError("no state"))
    'no state'
    """
    while error.__cause__ is not None:  # Orbax wraps it in a list of all its handlers
        error = error.__cause__
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    line = (text or type(error).__name__).splitlines()[0]
    line = line[max(line.rfind('local file "'), 0) :]  # TensorStore puts the layers above before it
    line = line.partition(" [tensorstore")[0].partition(" [source")[0]
    line = f"invalid JSON: {line}" if isinstance(error, json.JSONDecodeError) else line
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
