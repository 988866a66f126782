"""Folders that `pack` writes: all of them or nothing, whatever ends the process."""

import fcntl
import os
import signal as signals
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import call

from jmp_train.data import DataError, write_records

ROWS = [{"x": np.full(2, i, np.float32)} for i in range(4)]
EXPERIMENT = """
import os
import signal

import jmp_train as jt
import numpy as np
from jmp_train.models import Mlp, Model


class Points:
    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == 7:
            os.kill(os.getpid(), signal.SIGNAL)
        return {"image": np.full(2, index, np.float32), "label": index % 2}


EXPERIMENT = jt.Experiment(
    Model(Mlp, inputs=lambda spec: 2, outputs=lambda spec: 2, hidden=(4,)),
    jt.Data(Points(), classes=2),
)
"""


@pytest.fixture
def interruptible():
    """A shell that starts the tests in the background has SIGINT ignored."""
    before = signals.signal(signals.SIGINT, signals.default_int_handler)
    yield
    signals.signal(signals.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("signal,status", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_leaves_nothing(tmp_path, monkeypatch, capsys, signal, status):
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    Path("experiments", "points.py").write_text(EXPERIMENT.replace("SIGNAL", signal))
    assert call(capsys, "pack", "points", "out")[0] == status
    assert [path.name for path in tmp_path.iterdir()] == ["experiments"]


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    ended, others = ended_process(), ended_process()
    left = tmp_path / f".out.{ended}"
    kept = [
        f".out.{os.getppid()}",
        f".out.{others}",
        f".other.{ended}",
        f".out.{ended}.old",
        ".out.x",
    ]
    for folder in (left, *(tmp_path / name for name in kept)):
        folder.mkdir()
        (folder / "file").write_text("mine")
    held = os.open(tmp_path / f".out.{others}", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)  # as a process of another container does
    write_records(ROWS, tmp_path / "out")
    os.close(held)
    assert {path.name for path in tmp_path.iterdir()} == {"out", *kept}
    assert all((tmp_path / name / "file").read_text() == "mine" for name in kept)


def test_a_link_in_the_place_of_what_was_left_is_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / f".out.{ended_process()}").symlink_to(tmp_path / "mine")
    write_records(ROWS, tmp_path / "out")
    assert (tmp_path / "mine" / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into every folder")
def test_a_folder_without_permission_is_one_line_before_the_work(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    refused_unread(tmp_path / "closed" / "deeper" / "out", "no folder can be made in .*closed$")


def test_a_place_below_a_file_is_one_line_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    refused_unread(tmp_path / "file" / "deeper" / "out", "no folder can be made in .*file$")
    # 255 bytes: the longest name that is allowed, so that any name made of it is too long
    refused_unread(tmp_path / ("x" * 255), "cannot be written: File name too long")


def refused_unread(folder, match):
    class Unread:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise AssertionError("an example was read")

    with pytest.raises(DataError, match=match):
        write_records(Unread(), folder)
