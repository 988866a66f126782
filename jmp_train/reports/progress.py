"""The progress of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from jmp_train.types import Json

_LAST = ("learning_rate", "loss_scale", "skipped_steps", "skipped_examples", "steps_per_second")
_RECORDED = (*_LAST, "skipped_in_row", "nonfinite_tensors", "grad_norm", "averaged_steps")


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
    return "  ".join(_shown(values))


def _shown(values: Json) -> list[str]:
    """Return the texts of the loss, the metrics of the task, the loss scale, skips and the rate."""
    metrics = [
        name
        for name, value in values.items()
        if name not in _RECORDED
        and not name.startswith("last_")
        and isinstance(value, (int, float))
    ]
    shown = [
        f"{display_name(k)} {values[k]:.4f}" for k in sorted(metrics, key=lambda k: k != "loss")
    ]
    for name in _LAST:
        if name not in values or (name == "skipped_steps" and not values[name]):
            continue
        value = values[name]
        if name == "steps_per_second":
            shown.append(f"{value:.3g} steps/s" if value < 100 else f"{value:.0f} steps/s")
        elif name == "learning_rate":
            shown.append(f"{display_name(name)} {value:.2e}")
        else:
            shown.append(f"{display_name(name.removesuffix('_steps'))} {value:.6g}")
    return shown


def print_header(console: Console, rows: dict[str, str]) -> None:
    """Print names and values in two columns; the lines of a value stand below each other."""
    width = max(map(len, rows))
    for name, text in rows.items():
        for i, line in enumerate(text.splitlines()):
            print_line(console, f"{'' if i else name:{width}}  {line}")


class _Items:
    """A renderable: texts side by side, in as many lines as they need."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = ""
        for text in self.texts:
            if line and cell_len(f"{line}  {text}") > options.max_width:
                yield Text(line)
                line = text
            else:
                line = f"{line}  {text}" if line else text
        yield Text(line, overflow="fold")


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
        self._name = name
        self._live = None
        if console.is_interactive and not console.quiet:
            # The bar gives way where the line is short; the values have lines of their own.
            self._bar = Progress(
                BarColumn(bar_width=None),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                expand=True,
            )
            self._task = self._bar.add_task(name, total=total, completed=start)
            self._values = _Items()
            self._live = Live(Group(self._bar, self._values), console=console)
            self._live.start()

    def train(self, step: int, values: Json) -> None:
        """Show the values of a step."""
        if self._live is not None:
            self._values.texts = [self._name, *_shown(values)]
            self._bar.update(self._task, completed=step)
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
        if self._live is not None:
            self._live.stop()
