"""A process that attends to one of several processes of a run, and says in a line how it ended.

When another process of the run is lost, JAX ends this one at once, from C++, with a trace of its own.
"""

from __future__ import annotations

import collections
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

from jmp_train.runs.launched import MARK, is_attended, launched

# Of what JAX writes when it ends a process: lines that begin a message, and those that continue one.
_BEGINS = re.compile(
    r"[EFIW]\d{4} \d\d:\d\d:\d\d|\*\*\* |\[Gloo\] |:UNKNOWN:|WARNING: All log messages before absl"
    r"|.* Expected number of connected peer ranks is"  # Gloo's threads write within each other's lines
)
_CONTINUES = re.compile(
    r"\s*$|\s+@ +0x|\d+$|The tasks have|RPC: |Additional GRPC|Barrier|:UNKNOWN:|\*\*\* |\[Gloo\] "
)
_HANDED_ON = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
]
_KEPT = 30  # of these lines, shown if a signal of its own ends the process


_ADDRESS = ("--coordinator", "--processes", "--process")


def wants_attention(arguments: Sequence[str]) -> bool:
    """Return whether this process is one of several of a run, and no process attends to it yet."""
    named = {word.partition("=")[0] for word in arguments}
    of_several = not named.isdisjoint(_ADDRESS) or launched()
    return arguments[:1] == ["train"] and of_several and not is_attended()


def attend() -> int:
    """Run this program again in a process, hand on signals to it, and return its exit status."""
    environment = {**os.environ, MARK: str(os.getpid())}
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a signal to the group, as of a terminal, comes once, from here
        # Safe, because this process has no other threads yet.
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
    )

    def hand_on(signum: int, frame: FrameType | None) -> None:
        child.send_signal(signum)

    for signum in _HANDED_ON:
        signal.signal(signum, hand_on)
    assert child.stderr is not None
    held: collections.deque[str] = collections.deque(maxlen=_KEPT)
    copier = threading.Thread(target=_copy, args=(child.stderr, held))
    copier.start()
    status = child.wait()
    copier.join()
    if status != -signal.SIGABRT:  # which is how JAX ends a process that lost another one
        if status < 0 and -status not in _HANDED_ON:  # a fault of a library, perhaps
            sys.stderr.writelines(held)
        return status if status >= 0 else 128 - status
    from jmp_train.cli.failures import failure
    from jmp_train.runs.processes import Lost

    lost = failure(Lost())
    print(f"jmp-train: {lost.text}", file=sys.stderr)
    return lost.status


def own_output() -> None:
    """Give descriptor 1 of this attended process to standard error, and Python the standard output.

    Gloo writes to descriptor 1, from C++; its lines are then held with JAX's other messages.
    """
    shown = sys.stdout
    sys.stdout = open(os.dup(1), "w", buffering=1, encoding=shown.encoding, errors=shown.errors)  # noqa: SIM115
    os.dup2(2, 1)


def leave(status: int) -> None:
    """End this attended process now; at a usual exit JAX waits for the others, and they for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _copy(lines: IO[str], held: collections.deque[str]) -> None:
    """Copy what a process writes to standard error, but for messages of JAX, which are held."""
    within = False
    for line in lines:
        within = bool(_BEGINS.match(line) or (within and _CONTINUES.match(line)))
        if within:
            held.append(line)
        else:
            sys.stderr.write(line)
            sys.stderr.flush()
