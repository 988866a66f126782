"""Progress: a line that people read, and a live bar on a terminal."""

import io

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


def test_the_live_bar_shows_the_same_numbers():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    progress = RunProgress(console, start=0, total=10, name="mlp")
    progress.train(10, {"loss": 0.5, "loss_scale": 1.0, "steps_per_second": 12.0})
    progress.close()
    assert "10/10" in out.getvalue() and "loss 0.5000" in out.getvalue()


def test_no_skip_is_not_mentioned():
    assert "skipped" not in format_values({"loss": 1.0, "skipped_steps": 0})
