"""Signals that end a run after its state is saved."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from jmp_train.runs.launched import is_attended

_ENDING = ("SIGTERM", "SIGINT", "SIGUSR1")  # SLURM sends the last before it takes a node back


class Stopped(Exception):
    """A signal ended the run; its state is saved."""

    def __init__(self, signum: int, step: int, run_dir: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step}; {run_dir}")
        self.signum = signum


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Raise SystemExit at SIGTERM, so that what is half done is removed; a second one ends the process
    at once."""

    def end(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)
        raise SystemExit(128 + signum)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # only the main thread may handle signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextlib.contextmanager
def collect_signals(*, notice: bool = False, shared: bool = False) -> Iterator[list[int]]:
    """Collect the first ending signal in a list; a second signal has its usual effect.

    Args:
      notice: whether to write a line to standard error when the first one comes.
      shared: whether other processes have to stop too. JAX then has its own handler of SIGTERM, which
        tells them, and the other signals are handed on to it.
    """
    caught: list[int] = []
    before: dict[int, Any] = {}
    first = 0.0  # when the first one came
    # One signal may come twice: to all processes of a job, and by the process that attends to this one.
    same = 1.0 if is_attended() else 0.0

    def restore() -> None:
        for signum, previous in before.items():
            signal.signal(signum, previous or signal.SIG_DFL)

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        if caught:
            if time.monotonic() - first >= same:
                restore()
                os.kill(os.getpid(), signum)
            return
        first = time.monotonic()
        caught.append(signum)
        if shared:
            os.kill(os.getpid(), signal.SIGTERM)
        if notice:  # unbuffered, because the signal may have interrupted a print
            name = signal.Signals(signum).name
            os.write(
                2,
                f"\n{name}: the run saves its state and ends; a second signal ends it at once\n".encode(),
            )

    try:
        names = _ENDING[1:] if shared else _ENDING
        for signum in (getattr(signal, name, None) for name in names):
            if signum is not None:  # Windows has no SIGUSR1
                before[signum] = signal.signal(signum, handle)
    except ValueError:  # only the main thread may handle signals
        pass
    try:
        yield caught
    finally:
        restore()
