"""The folder of a command's results: the given one, or a new one named after the time."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from jmp_train.errors import UsageError
from jmp_train.runs.processes import of_first, several


@contextlib.contextmanager
def results_folder(given: Path | None, parent: Path) -> Iterator[Path]:
    """Return the given folder, or make one in `parent`; one that stays empty is removed after
    an error.

    Raises:
      UsageError: if the folder cannot be made.
    """
    if given is not None:
        yield given
        return
    if several():  # no folder is removed that another process may use
        yield Path(of_first(lambda: str(_new_folder(parent))))
        return
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    folder = _new_folder(parent)
    try:
        yield folder
    except Exception:
        with contextlib.suppress(OSError):  # not empty
            for made in (folder, *missing):
                made.rmdir()
        raise


def _new_folder(parent: Path) -> Path:
    """Make a folder named after the time."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        folder = parent / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run that began in the same second
            continue
        except OSError as error:
            raise UsageError(f"{folder} cannot be written: {error.strerror}") from None
        return folder
    raise AssertionError("itertools.count does not end")
