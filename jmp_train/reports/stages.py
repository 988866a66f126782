"""The stages of a run before its first step, with the seconds that each took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jmp_train.reports.progress import print_line


@contextlib.contextmanager
def stage(console: Console, name: str) -> Iterator[None]:
    """Show a stage while it runs, and the seconds that it took.

    A terminal shows a spinner and the time so far. Elsewhere the line begins at once and ends with the
    seconds, so nothing else may be printed meanwhile.

    Args:
      console: where to show it; a quiet one shows nothing.
      name: what is done, such as "compiling".

    >>> with stage(Console(), "loading data"):
    ...     pass
    loading data ... 0.0 s
    """
    began = time.perf_counter()
    with _spinner(console, name) if console.is_interactive else _open_line(console, name) as head:
        yield
    print_line(console, f"{head}{time.perf_counter() - began:.1f} s")


def terminal_alone() -> Console:
    """Return a console of standard error that is quiet unless that is a terminal.

    For commands whose standard output is their result: in a file, standard error has errors alone.
    """
    console = Console(stderr=True)
    console.quiet = not console.is_interactive
    return console


@contextlib.contextmanager
def _spinner(console: Console, name: str) -> Iterator[str]:
    columns = (SpinnerColumn("line"), TextColumn(name, markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=console.quiet) as progress:
        progress.add_task(name, total=None)
        yield f"{name} ... "


@contextlib.contextmanager
def _open_line(console: Console, name: str) -> Iterator[str]:
    console.print(f"{name} ... ", end="", highlight=False, markup=False, soft_wrap=True)
    try:
        yield ""
    except BaseException:
        console.print()
        raise
