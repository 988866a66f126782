"""Data that change between batches end the run in one line, saved before them; schedules are checked."""

import dataclasses
import json

import grain
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from helpers.marks import slow
from helpers.saved_arrays import assert_same_arrays, final_arrays

import jmp_train as jt
from jmp_train.data import DataError
from jmp_train.data.order import Order
from jmp_train.errors import UsageError

pytestmark = pytest.mark.usefixtures("quick_runs")

ROWS = np.random.default_rng(0).normal(size=(96, 4)).astype(np.float32)
HELD_OUT = {"x": ROWS[:9], "y": ROWS[:9, 0]}
BAD = 5  # the index of the batch that differs


def other_shape(batch):
    return {**batch, "x": np.zeros((8, 5), np.float32)}


def other_dtype(batch):
    return {**batch, "x": batch["x"].astype(np.int32)}


def other_names(batch):
    return {**batch, "z": batch["y"]}


def batches_with(change):
    def batches(batch_size):
        for i in range(12):
            rows = ROWS[8 * i : 8 * i + batch_size]
            batch = {"x": rows, "y": rows[:, 0]}
            yield change(batch) if i == BAD else batch

    return batches


class Seekable:
    """An iterator of batches that resumes at a position."""

    def __init__(self, change):
        self.change, self.at = change, 0

    def __iter__(self):
        return self

    def __next__(self):
        rows = ROWS[8 * self.at : 8 * self.at + 8]
        batch = {"x": rows, "y": rows[:, 0]}
        self.at += 1
        return self.change(batch) if self.at - 1 == BAD else batch

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def experiment(load, **settings):
    task = jt.Task(lambda o, b: jnp.square(o[:, 0] - b["y"]), targets="y")
    settings = {"steps": 12, "batch_size": 8, "trackers": (), "task": task} | settings
    settings = {"log_every": 4, "eval_every": 4, "checkpoint_every": 4} | settings
    data = jt.Data(lambda: (load, HELD_OUT))
    if "schedule" not in settings:
        settings["optimizer"] = jt.optim.OptimizerConfig(learning_rate=0.1, schedule="constant")
    return jt.Experiment(jt.Model(lambda: linen.Dense(1)), data, **settings)


@pytest.mark.parametrize(
    "change,message",
    [
        (other_shape, "batch 5: 'x' has the shape (8, 5); expected (8, 4), as in batch 0"),
        (other_dtype, "batch 5: 'x' has the dtype int32; expected float32, as in batch 0"),
        (other_names, "batch 5 has x, y, z; expected x, y, as in batch 0"),
    ],
)  # fmt: skip
def test_a_batch_unlike_the_first_is_one_line(tmp_path, change, message):
    with pytest.raises(DataError) as error:
        jt.train(experiment(batches_with(change), steps_per_call=1), tmp_path)
    assert str(error.value) == message
    assert (tmp_path / "checkpoints" / "5").is_dir()  # the steps before it are saved


@pytest.mark.parametrize("change", [other_shape, other_dtype, other_names])
def test_a_batch_unlike_others_of_its_call_is_one_line(tmp_path, change):
    with pytest.raises(DataError, match=r"^batch 5.*; expected .*, as in batch 0$"):
        jt.train(experiment(batches_with(change), steps_per_call=4), tmp_path)
    assert (tmp_path / "checkpoints" / "4").is_dir()


@pytest.mark.parametrize("per_call", [4, slow(1)])
@pytest.mark.parametrize(
    "form", [batches_with, lambda change: lambda: Seekable(change)], ids=["read again", "seekable"]
)
def test_a_run_with_mended_data_resumes_with_the_batch_that_was_refused(tmp_path, form, per_call):
    settings = {"steps_per_call": per_call}
    jt.train(experiment(form(lambda batch: batch), **settings), tmp_path / "whole")
    with pytest.raises(DataError):
        jt.train(experiment(form(other_shape), **settings), tmp_path / "mended")
    jt.train(experiment(form(lambda batch: batch), **settings), tmp_path / "mended")
    assert_same_arrays(final_arrays(tmp_path / "whole"), final_arrays(tmp_path / "mended"))


class Changing:
    """Examples of which one is longer; a batch of one example agrees with itself."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        x = np.zeros(5, np.float32) if index == 30 else ROWS[index]
        return {"x": x, "y": x[0]}


@pytest.mark.parametrize("per_call", [1, 4])
def test_examples_that_differ_between_batches_are_one_line(tmp_path, per_call):
    settings = {"batch_size": 1, "steps": 96, "eval_every": 96, "checkpoint_every": 96}
    with pytest.raises(DataError, match=r"example 30: 'x' has the shape \(5,\); expected \(4,\)"):
        jt.train(experiment(Changing(), steps_per_call=per_call, **settings), tmp_path)


def test_a_grain_stream_that_changes_resumes_where_it_was_refused(tmp_path):
    def load(change):
        rows = [{"x": x, "y": x[0]} for x in ROWS]
        source = grain.MapDataset.source(rows).to_iter_dataset()
        count = iter(range(10**6))  # the first two calls are for the spec and the shapes
        return jt.Data(
            lambda: (source, HELD_OUT),
            batch_transform=lambda b, rng: change(b) if next(count) == BAD + 2 else b,
        )

    own = experiment(None, steps_per_call=1)
    with pytest.raises(DataError, match="batch 5: 'x' has the shape"):
        jt.train(dataclasses.replace(own, data=load(other_shape)), tmp_path / "mended")
    for name in ("mended", "whole"):
        jt.train(dataclasses.replace(own, data=load(lambda b: b)), tmp_path / name)
    assert_same_arrays(final_arrays(tmp_path / "whole"), final_arrays(tmp_path / "mended"))


def test_examples_left_out_of_a_refused_batch_are_not_counted_and_the_others_are(tmp_path):
    class Damaged(list):
        def __getitem__(self, index):
            if index % 10 == 3:
                raise OSError("damaged")
            return super().__getitem__(index)

    rows = Damaged({"x": x, "y": x[0]} for x in ROWS)
    count = iter(range(10**6))  # the first two calls are for the spec and the shapes
    own = jt.Data(
        lambda: (rows, HELD_OUT),
        on_bad="skip",
        batch_transform=lambda b, rng: other_shape(b) if next(count) == 6 else b,
    )
    settings = {"steps": 12, "steps_per_call": 1, "eval_every": 12, "checkpoint_every": 12}
    run = dataclasses.replace(experiment(None, **settings), data=own)
    with pytest.raises(DataError, match="the batch of step"):
        jt.train(run, tmp_path)
    (saved,) = (tmp_path / "checkpoints").iterdir()
    order = Order(len(rows), 8, seed=run.seed)
    rows_read = np.concatenate(list(order.rows(0, batches=int(saved.name))))
    metadata = json.loads((saved / "_CHECKPOINT_METADATA").read_text())
    position = metadata["custom_metadata"]["extra"]["data"]
    assert int(saved.name) == 4
    assert position == {"next_batch": 4, "skipped_examples": int((rows_read % 10 == 3).sum())}


@pytest.mark.parametrize(
    "schedule,message",
    [
        (lambda n: 0.1 if n < 5 else 0.01,
         r"cannot be computed: TracerBool.*: Attempted .*data.py, line \d+\); expected .* jnp.where"),
        (lambda: 0.1, "schedule cannot be computed: TypeError: .*takes 0 positional arguments"),
        (lambda n: jnp.ones(3), r"schedule returned shape \(3,\) and dtype float32; expected one real"),
        (lambda n: None, "the learning rate schedule cannot be computed"),
        (lambda n: n > 3, r"schedule returned shape \(\) and dtype bool; expected one real number"),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_be_computed_is_named(tmp_path, schedule, message):
    own = experiment(batches_with(lambda b: b), schedule=schedule)
    with pytest.raises(UsageError, match=message) as error:
        jt.train(own, tmp_path / "run")
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "run").exists()
