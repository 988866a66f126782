"""The shell command that resumes a run that was interrupted."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from jmp_train.runs.signals import Stopped


@contextlib.contextmanager
def tell_how_to_resume(given: list[str], directory: list[str]) -> Iterator[None]:
    """Add a note with the command that resumes to the exception of a run that a signal ended.

    Args:
      given: the arguments of the program.
      directory: the arguments to add, which name the directory of the run.
    """
    try:
        yield
    except (Stopped, KeyboardInterrupt) as error:
        again = [word for word in given if word != "--resume"]  # it may choose another run
        words = [*_program(given), *again, *directory]
        error.add_note(f"resume with:\n  {' '.join(map(quote, words))}")
        raise


def _program(given: list[str]) -> list[str]:
    """Return the words that started this program, up to its arguments."""
    if not given or sys.argv[1:] != given:  # `main` was called with arguments
        return ["jmp-train"]
    words, script = sys.orig_argv[: -len(given)], sys.argv[0]
    if words[-1:] != [script] or not os.access(script, os.X_OK):
        return words  # such as python -m jmp_train
    found = shutil.which(Path(script).name)
    if found and os.path.samefile(found, script):
        return [Path(script).name]
    return [script]


def quote(word: str) -> str:
    r"""Quote a word for a shell; one with unprintable characters for bash, ksh or zsh.

    >>> print(quote("a b"), quote("$HOME"), quote("caf\xe9"), quote("a\n'"))
    'a b' '$HOME' 'café' $'\x61\x0a\x27'
    """
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(f"\\x{byte:02x}" for byte in os.fsencode(word)) + "'"
