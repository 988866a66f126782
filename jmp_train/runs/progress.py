"""How a run shows itself: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

_SHOWN = ("loss", "accuracy", "bits_per_byte", "loss_scale", "skipped_steps", "steps_per_second")


def format_values(values: dict[str, Any]) -> str:
    """The numbers worth a place on one line.

    >>> format_values({"loss": 0.12345, "loss_scale": 65536.0, "steps_per_second": 812.3})
    'loss 0.1235  loss scale 65536  812 steps/s'
    """
    words = []
    for name in _SHOWN:
        if name not in values or (name == "skipped_steps" and not values[name]):
            continue
        value = values[name]
        if name == "steps_per_second":
            words.append(f"{value:.3g} steps/s" if value < 100 else f"{value:.0f} steps/s")
        elif name in ("loss_scale", "skipped_steps"):
            words.append(f"{name.replace('_steps', '').replace('_', ' ')} {value:.6g}")
        else:
            words.append(f"{name.replace('_', ' ')} {value:.4f}")
    return "  ".join(words)


class RunProgress:
    """Shows steps, loss, rate, loss scale and the time left.

    Args:
      console: where to; a live bar if it is a terminal.
      start: steps already taken.
      total: steps in the run.
      name: what is being trained.
    """

    def __init__(self, console: Console, *, start: int, total: int, name: str):
        self._console = console
        self._total = total
        self._began = time.monotonic()
        self._start = start
        self._bar = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn(name, markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[values]}", markup=False),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(name, total=total, completed=start, values="")
            self._bar.start()

    def train(self, step: int, values: dict[str, Any]) -> None:
        """Shows where training stands."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, values=format_values(values))
            return
        rate = (step - self._start) / max(time.monotonic() - self._began, 1e-9)
        left = (self._total - step) / rate if rate > 0 else 0.0
        line = f"step {step:>{len(str(self._total))}}/{self._total}  {format_values(values)}"
        self._console.print(
            f"{line}  {left:.0f} s left", highlight=False, markup=False, soft_wrap=True
        )

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Shows an evaluation."""
        line = f"eval at step {step}  " + "  ".join(
            f"{k.replace('_', ' ')} {v:.4f}" for k, v in values.items()
        )
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the live bar."""
        if self._bar is not None:
            self._bar.stop()
