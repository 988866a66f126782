"""A process that attends to one of several processes of a run, and says in a line how it ended.

When another process of the run is lost, JAX ends this one at once, from C++, with a trace of its own.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import IO

from jmp_train.runs.launched import launched

_MARK = "JMP_TRAIN_ATTENDED"
LOST = 5
"""Exit status of a process whose run lost another one."""

# Of the trace that JAX writes when it ends a process.
_TRACE = re.compile(
    r"^(\s+@ |\*\*\* |[EFIW]\d{4} |\[Gloo\]|:UNKNOWN:)|coordination|grpc|Coordination|^Barrier|^\d+$|^The tasks have|^RPC: |^Additional GRPC|^$"
)


_ADDRESS = ("--coordinator", "--processes", "--process")


def is_attended() -> bool:
    """Return whether another process attends to this one."""
    return os.environ.get(_MARK) == str(os.getppid())


def wants_attention(arguments: Sequence[str]) -> bool:
    """Return whether this process is one of several of a run, and no process attends to it yet."""
    named = {word.partition("=")[0] for word in arguments}
    of_several = not named.isdisjoint(_ADDRESS) or launched()
    return arguments[:1] == ["train"] and of_several and not is_attended()


def attend() -> int:
    """Run this program again in a process, hand on signals to it, and return its exit status."""
    environment = {**os.environ, _MARK: str(os.getpid())}
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # Safe, because this process has no other threads yet.
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
    )

    def hand_on(signum: int, frame: FrameType | None) -> None:
        child.send_signal(signum)

    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), hand_on)
    assert child.stderr is not None
    copier = threading.Thread(target=_copy, args=(child.stderr,))
    copier.start()
    status = child.wait()
    copier.join()
    if status not in (-signal.SIGABRT, LOST):
        return status if status >= 0 else 128 - status
    print(
        "jmp-train: another process of the run ended, or did not answer; the same commands resume the "
        "run from its newest checkpoint",
        file=sys.stderr,
    )
    return LOST


def leave(status: int) -> None:
    """End this attended process now; at a usual exit JAX waits for the others, and they for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _copy(lines: IO[str]) -> None:
    """Copy what a process writes to standard error, but for the trace of JAX."""
    for line in lines:
        if not _TRACE.search(line):
            sys.stderr.write(line)
            sys.stderr.flush()
