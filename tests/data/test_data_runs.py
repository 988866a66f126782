"""Runs on a user's data, from the command line: killed and resumed bitwise, errors in one line."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers.saved_arrays import assert_same_arrays, final_arrays

from jmp_train.data import DataError
from jmp_train.runs.user_code import one_line_errors

ROOT = Path(__file__).resolve().parents[2]
FILE = """
import time

import grain
import numpy as np

import jmp_train as jt
from jmp_train.models import Mlp
from jmp_train.optim import OptimizerConfig


def examples(count):
    rng = np.random.default_rng(0)
    return [{"image": rng.normal(size=4), "label": i % 3} for i in range(count)]


class Bad(list):
    def __getitem__(self, index):
        if index == 5 and len(self) == 37:
            raise OSError("unreadable")
        return super().__getitem__(index)


def batches(seed):
    rng = np.random.default_rng(seed)
    while True:
        yield {"image": rng.normal(size=(8, 4)), "label": rng.integers(0, 3, 8)}


def load(form: str = "list", slow: float = 0.0):
    if form == "list":
        return examples(60)
    if form == "bad":
        return Bad(examples(37)), examples(9)
    if form == "stream":
        source = grain.MapDataset.source(examples(60)).shuffle(1)
        return source.to_iter_dataset(), examples(9)
    return batches, examples(9)


def noise(batch, rng):
    time.sleep(0.02)
    return {**batch, "image": batch["image"] + rng.normal(size=batch["image"].shape)}


EXPERIMENT = jt.Experiment(
    model=jt.Model(Mlp, inputs=4, outputs=3, hidden=(8,)),
    data=jt.Data(load, classes=3, batch_transform=noise),
    steps=60,
    batch_size=8,
    log_every=5,
    eval_every=20,
    checkpoint_every=5,
    checkpoint_wait=True,
    optimizer=OptimizerConfig(warmup_steps=5),
)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "own.py").write_text(textwrap.dedent(FILE))
    return tmp_path


def words(run, *options):
    # `-c`, because `-m` would let worker processes import the folder `experiments` by chance.
    code = "from jmp_train.cli.main import console_script; console_script()"
    return [sys.executable, "-P", "-c", code, "train", "own", "--run-dir", str(run), *options]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def call(folder, run, *options):
    return subprocess.run(
        words(run, *options), cwd=folder, env=environment(), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        ("--data.form", "list", "--data.workers", "2"),
        ("--data.form", "stream", "--data.workers", "1"),
        ("--data.form", "function"),
    ],
    ids=lambda options: options[1],
)
@pytest.mark.slow
def test_a_killed_run_on_own_data_resumes_bitwise(folder, options):
    undisturbed = call(folder, folder / "a", *options)
    assert undisturbed.returncode == 0, undisturbed.stderr
    process = subprocess.Popen(
        words(folder / "b", *options), cwd=folder, env=environment(), stdout=subprocess.DEVNULL
    )
    until = time.monotonic() + 90
    while not (folder / "b" / "checkpoints" / "10").is_dir() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = call(folder, folder / "b", *options)
    assert resumed.returncode == 0, resumed.stderr
    assert "is at step" in resumed.stdout
    assert ("batches again" in resumed.stdout) == (options[1] == "function")
    assert_same_arrays(final_arrays(folder / "a"), final_arrays(folder / "b"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_unreadable_example_ends_the_run_with_its_index(folder, workers):
    ended = call(folder, folder / "a", "--data.form", "bad", "--data.workers", workers)
    assert ended.returncode == 2
    line = "jmp-train: example 5 cannot be read: OSError: unreadable\n"
    assert ended.stderr == line


def test_an_unknown_field_of_the_function_is_named(folder):
    ended = call(folder, folder / "a", "--data.fom", "list")
    assert ended.returncode == 2 and "--data.form" in ended.stderr


def test_an_error_of_the_data_is_not_taken_for_one_of_the_network():
    with pytest.raises(DataError, match=r"^example 5 is 3; expected a dict$"), one_line_errors():
        raise DataError("example 5 is 3; expected a dict")
