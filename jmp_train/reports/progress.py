"""The progress of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from jmp_train.types import Json

_SHOWN = (
    "loss",
    "accuracy",
    "bits_per_byte",
    "learning_rate",
    "loss_scale",
    "skipped_steps",
    "steps_per_second",
)


def print_line(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no highlighting, no line breaks added."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def display_name(name: str) -> str:
    """Return the name of a value with spaces for underscores.

    >>> display_name("bits_per_byte")
    'bits per byte'
    """
    return name.replace("_", " ")


def format_values(values: Json) -> str:
    """Return the most important values as one line.

    >>> format_values({"loss": 0.12345, "learning_rate": 2e-3, "steps_per_second": 812.3})
    'loss 0.1235  learning rate 2.00e-03  812 steps/s'
    """
    shown = []
    for name in _SHOWN:
        if name not in values or (name == "skipped_steps" and not values[name]):
            continue
        value = values[name]
        if name == "steps_per_second":
            shown.append(f"{value:.3g} steps/s" if value < 100 else f"{value:.0f} steps/s")
        elif name == "learning_rate":
            shown.append(f"{display_name(name)} {value:.2e}")
        elif name in ("loss_scale", "skipped_steps"):
            shown.append(f"{display_name(name.removesuffix('_steps'))} {value:.6g}")
        else:
            shown.append(f"{display_name(name)} {value:.4f}")
    return "  ".join(shown)


class RunProgress:
    """Shows steps, loss, rate, loss scale and the time left.

    Args:
      console: gets a live bar if it is a terminal, else lines.
      start: steps already taken.
      total: steps in the run.
      name: the name of the experiment.
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

    def train(self, step: int, values: Json) -> None:
        """Show the values of a step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, values=format_values(values))
            return
        rate = (step - self._start) / max(time.monotonic() - self._began, 1e-9)
        left = (self._total - step) / rate if rate > 0 else 0.0
        line = f"step {step:>{len(str(self._total))}}/{self._total}  {format_values(values)}"
        print_line(self._console, f"{line}  {left:.0f} s left")

    def evaluation(self, step: int, values: Json) -> None:
        """Show an evaluation."""
        line = f"eval at step {step}  " + "  ".join(
            f"{display_name(k)} {v:.4f}" for k, v in values.items()
        )
        print_line(self._console, line)

    def close(self) -> None:
        """End the live bar."""
        if self._bar is not None:
            self._bar.stop()
