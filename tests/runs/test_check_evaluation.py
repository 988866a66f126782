"""What only an evaluation would show is refused in one line before training."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import jmp_train as jt
from jmp_train.cli.main import main
from jmp_train.errors import UsageError
from jmp_train.tasks.task import RESERVED

pytestmark = pytest.mark.usefixtures("quick_runs")

X = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
TRAIN = {"x": X, "y": X.sum(1)}


def squared(outputs, batch):
    return jnp.square(outputs[:, 0] - batch["y"])


def experiment(held_out=TRAIN, metrics=None, **settings):
    task = jt.Task(squared, metrics or {}, targets="y")
    settings = {"steps": 4, "batch_size": 8, "log_every": 2, "eval_every": 4} | settings
    settings = {"trackers": (), "task": task} | settings
    data = jt.Data(lambda: (TRAIN, held_out))
    return jt.Experiment(jt.Model(lambda: linen.Dense(1)), data, **settings)


def no_batches():
    return iter(())


def other_batches(batch_size):
    yield {"x": X[:3, :3], "y": X[:3, 0]}


def boolean(outputs, batch):
    return outputs[:, 0] if outputs[0, 0] > 0 else batch["y"]


@pytest.mark.parametrize(
    "held_out,message",
    [
        ({"x": X[:, :3], "y": X[:, 0]},
         "the held-out data have 'x' of shape (3,); expected (4,), as the training data have"),
        ({"x": (X * 9).astype(np.uint8), "y": X[:, 0]},
         "the held-out data have 'x' of dtype uint8; expected float32, as the training data have"),
        ({"x": X}, "the held-out data have x; expected x and y, which the task reads"),
        ([{"x": X[0, :3], "y": X[0, 0]}],
         "the held-out data have 'x' of shape (3,); expected (4,), as the training data have"),
        (other_batches,
         "the held-out data have 'x' of shape (3,); expected (4,), as the training data have"),
        (no_batches, "the held-out data are empty; expected at least one example"),
        ({**TRAIN, "mask": np.ones(40, np.float32)},
         "the mask has dtype float32; expected bool, such as mask != 0"),
    ],
)  # fmt: skip
def test_held_out_data_that_do_not_fit_are_one_line_before_training(tmp_path, held_out, message):
    with pytest.raises(UsageError) as error:
        jt.train(experiment(held_out), tmp_path / "run")
    assert str(error.value) == message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "metric,message",
    [
        (lambda o, b: jnp.sqrt(squared(o, b).mean()),
         r"metric 'own' has shape \(\); expected that of the mask, \(8,\), or its first axes: values"),
        (lambda o, b: o.mean(0, keepdims=True), r"metric 'own' has shape \(1, 1\); expected"),
        (lambda o, b: (o, o, o),
         r"metric 'own' is a tuple of 3; expected an array of one value per example, or a pair"),
        (lambda o, b: {"a": o}, "metric 'own' is a dict; expected an array of one value"),
        (lambda o, b: None, "metric 'own' is a NoneType; expected an array of one value"),
        (lambda o, b: (jnp.stack([o, o], 1), b["y"]),
         r"metric 'own' has values of shape \(8, 2, 1\) and weights of \(8,\); expected equal"),
        (boolean, r"the metric 'own' cannot be computed: Attempted boolean conversion .*line \d+\)"),
        (lambda o, b: b["weight"],
         r"the metric 'own' cannot be computed: KeyError: 'weight' \(.*check_evaluation.py, line"),
        (lambda o, b: 1 / 0, "the metric 'own' cannot be computed: ZeroDivisionError: division by"),
        (jnp.linalg.inv, "the metric 'own' cannot be computed: "),
    ],
)  # fmt: skip
def test_a_metric_that_cannot_be_computed_is_one_line_before_training(tmp_path, metric, message):
    with pytest.raises(UsageError, match=message) as error:
        jt.train(experiment(metrics={"own": metric}), tmp_path / "run")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("loss", [lambda o, b: None, lambda o, b: (o, o, o)])
def test_a_loss_of_another_form_is_one_line(tmp_path, loss):
    with pytest.raises(UsageError, match=r"metric 'loss' is a (NoneType|tuple of 3); expected"):
        jt.train(experiment(task=jt.Task(loss, targets="y")), tmp_path / "run")


def test_the_check_computes_nothing_and_loads_the_data_once(tmp_path):
    loads, traces = [], []

    def load():
        loads.append(1)
        return TRAIN, TRAIN

    def traced(outputs, batch):
        traces.append(isinstance(outputs, jax.core.Tracer))
        return outputs[:, 0]

    own = experiment(metrics={"own": traced})
    jt.train(dataclasses.replace(own, data=jt.Data(load)), tmp_path / "run")
    assert loads == [1]
    assert all(traces) and len(traces) <= 5  # check, steps per call, compiled call, evaluation


def test_a_mask_that_training_data_have_alone_is_checked_too(tmp_path):
    own = experiment()
    masked = jt.Data(lambda: ({**TRAIN, "mask": np.ones(40, np.int32)}, TRAIN))
    with pytest.raises(UsageError, match="the mask has dtype int32; expected an array of bool"):
        jt.train(dataclasses.replace(own, data=masked), tmp_path / "run")


def test_every_field_of_a_record_is_reserved(tmp_path):
    own = experiment(metrics={"own": lambda o, b: o[:, 0]}, policy="mixed_float16")
    seen = []
    jt.train(dataclasses.replace(own, on_record=lambda r, s: seen.append(r)), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    names = {name for record in [*seen, *map(json.loads, lines)] for name in record}
    assert {"own", "last_own", "grad_norm", "averaged_steps"} <= names
    assert {n for n in names if not n.startswith("last_")} - set(RESERVED) == {"own"}


def test_the_command_line_ends_with_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "own.py").write_text(
        "from runs.test_check_evaluation import experiment\n"
        "EXPERIMENT = experiment(metrics={'own': lambda o, b: o.mean()})\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(re.sub("runs/[^/]*$", "", __file__))
    assert main(["train", "own", "--compilation-cache", "False"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("jmp-train: metric 'own' has shape ()")
    assert len(shown.err.splitlines()) == 1 and not list(tmp_path.glob("runs/own/*"))
