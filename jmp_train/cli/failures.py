"""The exit status and the line of an error that ends a command."""

from __future__ import annotations

from typing import NamedTuple

from jax.errors import JaxRuntimeError

from jmp_train.errors import UsageError
from jmp_train.records.checkpoints import NotSaved, NoUsableCheckpoint
from jmp_train.runs.loop import Diverged
from jmp_train.runs.processes import Lost
from jmp_train.runs.signals import Stopped

LOST = 5
"""Exit status of a process whose run lost another one."""


class Failure(NamedTuple):
    status: int
    """Exit status; 1 for an error that no one expected, which is shown whole."""
    text: str


def failure(error: Exception) -> Failure:
    """Return how a command ends for an error."""
    text = str(error)
    match error:
        case UsageError():
            status = 2
        case Diverged():
            status = 3
        case NoUsableCheckpoint() | NotSaved():
            status = 4
        case Lost():
            status = LOST
        case Stopped():
            status = 128 + error.signum
        case MemoryError():
            return Failure(2, _out_of_memory(error))
        case JaxRuntimeError() if "RESOURCE_EXHAUSTED" in text:
            return Failure(2, _out_of_memory(error))
        case _:
            return Failure(1, f"{type(error).__name__}: {text}")
    return Failure(status, text)


def one_line(text: str, keep: str = "") -> str:
    """Return a text without characters that are not printable, whatever it quotes, except for some."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def _out_of_memory(error: Exception) -> str:
    what = str(error).partition("\n")[0]
    cause = f"out of memory: {what}" if what else "out of memory"
    return f"{cause}; expected a smaller model or batch, or more micro_batches"
