"""Progress: a line that people read, and a live bar on a terminal."""

import io
import re

import pytest
from rich.console import Console

from jmp_train.reports.progress import RunProgress, format_values


def test_plain_lines_hold_step_loss_rate_scale_and_time_left():
    out = io.StringIO()
    progress = RunProgress(Console(file=out, width=60), start=0, total=1000, name="mlp")
    values = {"loss": 0.5, "loss_scale": 65536.0, "steps_per_second": 250.0, "skipped_steps": 2}
    progress.train(100, values)
    progress.evaluation(100, {"accuracy": 0.97})
    progress.close()
    first, second = out.getvalue().splitlines()
    assert first.startswith("step  100/1000  loss 0.5000  loss scale 65536  skipped 2  250 steps/s")
    assert first.endswith("s left")
    assert second == "eval at step 100  accuracy 0.9700"


VALUES = {
    "accuracy": 0.9375, "loss": 0.5, "recall_at_5": 0.25, "grad_norm": 2.0, "loss_scale": 65536.0,
    "skipped_steps": 3, "skipped_in_row": 0, "steps_per_second": 1234.0, "nonfinite": ["a"],
    "nonfinite_tensors": 1, "last_skipped_step": 7, "learning_rate": 0.1,
}  # fmt: skip
SHOWN = ["loss 0.5000", "accuracy 0.9375", "recall at 5 0.2500", "learning rate 1.00e-01",
         "loss scale 65536", "skipped 3",
         "1234 steps/s"]  # fmt: skip


def screen(width, height=12):
    """A terminal and a function that returns its lines, read by a terminal emulator."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, force_interactive=True, width=width,
                      height=height, legacy_windows=False, _environ={"TERM": "xterm"})  # fmt: skip

    def lines():
        display = [""]
        text = re.sub(r"\x1b\[[0-9;?]*[mhl]", "", out.getvalue())
        row = 0
        for part in re.split(r"(\x1b\[\d*A|\x1b\[2K|\r|\n)", text):
            if up := re.fullmatch(r"\x1b\[(\d*)A", part):
                row -= int(up[1] or 1)
            elif part == "\n":
                row += 1
                display += [""] * (row + 1 - len(display))
            elif part == "\x1b[2K":
                display[row] = ""
            elif part != "\r" and part:
                display[row] = part
        return [line.rstrip() for line in display if line.strip()]

    return console, lines


@pytest.mark.parametrize("width", [24, 40, 60, 80, 120])
def test_the_live_bar_shows_every_value_at_any_width(width):
    console, lines = screen(width)
    progress = RunProgress(console, start=0, total=20000, name="gpt_124m_bf16")
    progress.train(10000, VALUES)
    progress.close()
    shown = lines()
    assert "10000/20000" in shown[0] and "\u2501" in shown[0]
    text = "  ".join(shown[1:])
    assert text == "  ".join(["gpt_124m_bf16", *SHOWN])
    assert all(len(line) <= width for line in shown)


def test_a_value_wider_than_the_screen_is_folded():
    console, lines = screen(12)
    progress = RunProgress(console, start=0, total=10, name="mlp")
    progress.train(10, {"loss": 1.0, "a_very_long_metric": 0.5})
    progress.close()
    text = "".join(lines()[1:]).replace(" ", "")
    assert text == "mlploss1.0000averylongmetric0.5000"


def test_lines_show_metrics_of_any_name():
    assert format_values(VALUES) == "  ".join(SHOWN)


def test_no_skip_is_not_mentioned():
    assert "skipped" not in format_values({"loss": 1.0, "skipped_steps": 0})
