"""Stages of a run: what is done, with the seconds that it took."""

import io
import re
import time

import pytest
from rich.console import Console

from jmp_train.reports.progress import print_header
from jmp_train.reports.stages import stage


def test_a_line_begins_at_once_and_ends_with_the_seconds():
    out = io.StringIO()
    with stage(Console(file=out), "compiling [x]"):
        assert out.getvalue() == "compiling [x] ... "
        time.sleep(0.2)
    seconds = float(re.fullmatch(r"compiling \[x\] \.\.\. (\d+\.\d) s\n", out.getvalue())[1])
    assert 0.2 <= seconds < 5


def test_a_failing_stage_ends_its_line():
    out = io.StringIO()
    with pytest.raises(ValueError), stage(Console(file=out), "loading data"):
        raise ValueError
    assert out.getvalue() == "loading data ... \n"


def test_a_terminal_shows_the_time_while_a_stage_runs():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, force_interactive=True, width=60,
                      _environ={"TERM": "xterm"})  # fmt: skip
    with stage(console, "compiling"):
        time.sleep(1.3)
        during = out.getvalue()
    assert "compiling" in during and "0:00:01" in during and " s\n" not in during
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert re.search(r"compiling \.\.\. 1\.[3-9] s\n$", plain)


def test_a_quiet_console_gets_nothing(capsys):
    with stage(Console(quiet=True, force_terminal=True, force_interactive=True), "compiling"):
        pass
    assert capsys.readouterr().out == ""


def test_the_lines_of_a_value_stand_below_each_other():
    out = io.StringIO()
    print_header(Console(file=out, width=20), {"run": "runs/" + "x" * 30, "precision": "a\nb=[c]"})
    assert out.getvalue() == f"run        runs/{'x' * 30}\nprecision  a\n           b=[c]\n"
