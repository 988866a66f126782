"""Worker processes: kept over passes, deaf to the signals of a run, and never left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import grain
import numpy as np
import pytest

import jmp_train as jt
from jmp_train.data import iterate, train_batches

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def stream(count):
    """Examples with the process that read them."""
    source = grain.MapDataset.source([{"id": i} for i in range(count)]).to_iter_dataset()
    noise = lambda example, rng: {**example, "own": rng.normal(), "pid": os.getpid()}
    held_out = [{"id": 0}]
    return jt.Data(lambda: (source, held_out), transform=noise, workers=2).load()


def test_processes_are_kept_over_passes_which_differ_in_their_random_numbers():
    batches = iterate(train_batches(stream(21).train, 3, seed=0, workers=2))
    taken = [next(batches) for _ in range(18)]  # passes of 11 // 3 + 10 // 3 batches
    batches.close()
    assert len(set(np.concatenate([b["pid"] for b in taken]).tolist())) == 2
    for start in (0, 6, 12):
        ids = np.concatenate([b["id"] for b in taken[start : start + 6]])
        assert sorted(ids) == [i for i in range(21) if i not in (18, 19, 20)]
    assert len(set(np.concatenate([b["own"] for b in taken]).tolist())) == 54


@pytest.mark.parametrize("at", [5, 6])
def test_a_position_of_workers_resumes_bitwise(at):
    made = train_batches(stream(21).train, 3, seed=0, workers=2)
    first, second = iterate(made), iterate(made)
    for _ in range(at):
        next(first)
    second.set_state(first.get_state())
    for _ in range(9):
        a, b = next(first), next(second)
        for name in ("id", "own"):
            np.testing.assert_array_equal(a[name], b[name])
    first.close()
    second.close()


FILE = """
import grain
import numpy as np

import jmp_train as jt
from jmp_train.models import Mlp


def examples(count):
    return [{"image": np.full(4, i, np.float32), "label": i % 3} for i in range(count)]


def load(form: str = "stream"):
    source = grain.MapDataset.source(examples(40)).shuffle(1)
    return (source.to_iter_dataset() if form == "stream" else source), examples(9)


EXPERIMENT = jt.Experiment(
    model=jt.Model(Mlp, inputs=4, outputs=3, hidden=(8,)),
    data=jt.Data(load, classes=3, workers=2),
    steps=100_000, batch_size=8, log_every=5, eval_every=5, checkpoint_every=5, steps_per_call=1,
)
"""


@pytest.fixture
def process(tmp_path, request):
    """A run of two workers in its own group of processes, past its first record."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "own.py").write_text(textwrap.dedent(FILE))
    code = "from jmp_train.cli.main import console_script; console_script()"
    words = ["train", "own", "--run-dir", "run", "--data.form", request.param]
    running = subprocess.Popen(
        [sys.executable, "-P", "-c", code, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    records = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (records.exists() and records.stat().st_size) and time.monotonic() < until:
        time.sleep(0.05)
    yield running
    for pid in of_group(running.pid):
        os.kill(pid, signal.SIGKILL)
    running.wait()


def of_group(group):
    """The processes of a group that have not ended."""
    listed = subprocess.run(
        ["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    rows = [line.split() for line in listed if line]
    return [int(pid) for pid, pgid, stat in rows if int(pgid) == group and stat[0] != "Z"]


def left_of(process):
    """The processes of a group that are left some seconds after the end of the first one."""
    until = time.monotonic() + 15
    while of_group(process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    return of_group(process.pid)


@pytest.mark.parametrize("process", ["stream", "map"], indirect=True)
@pytest.mark.parametrize("signum,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_whole_group_saves_the_run_and_leaves_nothing(process, signum, status):
    os.killpg(process.pid, signum)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert f"stopped by {signum.name}" in said and "resume with" in said
    assert "leaked" not in said and "Traceback" not in said
    assert left_of(process) == []


@pytest.mark.parametrize("process", ["stream"], indirect=True)
def test_workers_of_a_killed_run_end(process):
    assert len(of_group(process.pid)) >= 3
    process.kill()
    process.wait()
    assert left_of(process) == []
