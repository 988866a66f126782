"""Runs as a user sees them: the directory, resume to the bit, signals, and what is refused."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.saved_arrays import assert_same_arrays, final_arrays
from helpers.small_runs import QUIET, poisoned, signal_at, small
from rich.console import Console

import jmp_train as jt
from jmp_train.data.batches import state_at
from jmp_train.errors import UsageError
from jmp_train.policy.precision import get_precision
from jmp_train.records.checkpoints import Checkpoints
from jmp_train.records.metrics import read_metrics
from jmp_train.runs.build import build, first_state
from jmp_train.runs.context import RunContext
from jmp_train.runs.directory import read_config
from jmp_train.runs.evaluate import evaluate_run
from jmp_train.runs.investigate import investigate, scale_of
from jmp_train.runs.loop import Diverged, LastCall
from jmp_train.runs.signals import Stopped
from jmp_train.runs.train import train
from jmp_train.spec import DataSpec
from jmp_train.step.step import step_gradients

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("quick_runs")


def test_a_finished_run_directory_is_complete(tmp_path, plots):
    summary = train(small(), tmp_path / "run", name="mlp_fp16")
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        "config.json", "metrics.jsonl", "summary.json", "checkpoints", "tensorboard", "plots", "lock",
        "run_id",
        "spec.json",
    }  # fmt: skip
    assert json.loads((run / "summary.json").read_text()) == summary
    assert set(summary) >= {
        "experiment", "policy", "seed", "steps", "wall_time_s", "compile_time_s",
        "steps_per_second", "eval", "loss_scale", "skipped_steps", "parameters",
        "peak_memory_bytes", "device", "versions",
    }  # fmt: skip
    assert summary["parameters"] == 64 * 16 + 16 + 16 * 10 + 10
    assert summary["steps"] == 40 and summary["experiment"] == "mlp_fp16"
    # The parameters, two moments, and a batch at the very least.
    assert summary["peak_memory_bytes"] > 3 * 4 * summary["parameters"] + 128 * 64 * 4
    records = read_metrics(run / "metrics.jsonl")
    assert [(r["step"], r["split"]) for r in records] == [
        (10, "train"), (20, "train"), (20, "eval"), (30, "train"), (40, "train"), (40, "eval"),
    ]  # fmt: skip
    assert set(records[0]) >= {
        "loss", "accuracy", "loss_scale", "skipped_steps", "grad_norm", "steps_per_second",
    }  # fmt: skip
    name, values = read_config(run)
    assert name == "mlp_fp16" and values["optimizer.warmup_steps"] == 5
    assert {p.name for p in (run / "plots").iterdir()} == {
        "loss.png", "accuracy.png", "loss_scale.png", "grad_norm.png", "learning_rate.png",
    }  # fmt: skip
    assert evaluate_run(run, small()) == {"step": 40, **summary["eval"]}


@pytest.mark.parametrize(
    "name,fields",
    [
        pytest.param("mlp_fp32", {}, marks=pytest.mark.slow),
        ("mlp_fp16", {"micro_batches": 4, "ema_decay": 0.9}),
        pytest.param("mlp_bf16", {}, marks=pytest.mark.slow),
        pytest.param("mlp_fp16", {"steps_per_call": 5}, marks=pytest.mark.slow),
        pytest.param("gpt_fp16", {}, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_and_resumed_run_ends_bitwise_as_the_undisturbed_one(
    tmp_path, monkeypatch, name, fields
):
    experiment = small(name, log_every=5, **fields)
    train(experiment, tmp_path / "whole", name=name)

    # A signal at a log point, where the step is not a multiple of checkpoint_every.
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        signal_at(patch, 10)
        train(experiment, tmp_path / "cut", name=name)
    assert stopped.value.signum == signal.SIGTERM
    at = Checkpoints(tmp_path / "cut" / "checkpoints").steps()[-1]
    stopped_summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert stopped_summary["steps"] == at and stopped_summary["eval"] == {}
    assert 10 < at < 20 and at % 10 != 0

    summary = train(experiment, tmp_path / "cut", name=name)
    whole, cut = (final_arrays(tmp_path / d) for d in ("whole", "cut"))
    assert_same_arrays(whole, cut)
    assert len(whole) > 10
    assert summary["steps"] == 40
    kept = [
        [(r["step"], r["split"], r["loss"]) for r in read_metrics(tmp_path / d / "metrics.jsonl")]
        for d in ("whole", "cut")
    ]
    assert [r for r in kept[1] if r[0] % 5 == 0] == kept[0]
    assert len({r[:2] for r in kept[1]}) == len(kept[1])


def test_the_number_of_micro_batches_reaches_the_step(tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def spy(*args, micro_batches, **options):
        raise Seen(micro_batches)

    monkeypatch.setattr("jmp_train.runs.build.make_step", spy)
    with pytest.raises(Seen, match="^4$"):
        train(small(micro_batches=4), tmp_path, name="mlp_fp16")


@pytest.mark.slow
def test_run_killed_by_sigterm_exits_143_and_resumes(tmp_path):
    command = [
        sys.executable, "-m", "jmp_train", "train", "mlp_bf16", "--run-dir", str(tmp_path / "run"),
        "--steps", "1000000", "--log-every", "10",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert b"stopped by SIGTERM" in errors and b"Traceback" not in errors
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] >= 10


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_finished_run_is_not_changed(tmp_path):
    first = train(small("mlp_bf16"), tmp_path, name="mlp_bf16")
    before = files_of(tmp_path)
    assert train(small("mlp_bf16"), tmp_path, name="mlp_bf16") == first
    assert files_of(tmp_path) == before


@pytest.mark.slow
def test_a_finished_run_without_its_summary_gets_it_and_no_record_twice(tmp_path):
    first = train(small("mlp_bf16"), tmp_path, name="mlp_bf16")
    metrics = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "summary.json").unlink()
    (tmp_path / "diverged.json").write_text("{}")  # of an attempt that this one takes up again
    again = train(small("mlp_bf16"), tmp_path, name="mlp_bf16")
    assert again["eval"] == first["eval"] and again["steps"] == 40
    assert again["train_time_s"] == pytest.approx(first["train_time_s"])
    assert (tmp_path / "metrics.jsonl").read_text() == metrics
    assert not (tmp_path / "diverged.json").exists()


def test_the_best_checkpoint_is_kept_to_the_end(tmp_path, monkeypatch):
    # Accuracies that fall, so that the first evaluation is the best.
    values = iter([0.9, 0.5, 0.4, 0.3])
    monkeypatch.setattr(
        "jmp_train.runs.build.make_evaluate",
        lambda *_, **options: (
            lambda params, batches, state: {"accuracy": next(values), "loss": 1.0}
        ),
    )
    train(small("mlp_bf16", eval_every=10), tmp_path, name="mlp_bf16")
    assert Checkpoints(tmp_path / "checkpoints").steps() == [10, 30, 40]


def test_folder_with_other_files_is_refused_and_not_changed(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and is not a run directory"):
        train(small("mlp_bf16"), tmp_path, name="mlp_bf16")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_folder_that_the_checkpoint_library_cannot_take_is_refused(tmp_path):
    with pytest.raises(UsageError, match="contains one of the characters"):
        train(small("mlp_bf16"), tmp_path / "a[red]b", name="mlp_bf16")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_infinite_setting_resumes(tmp_path):
    experiment = small("mlp_bf16")
    scale = dataclasses.replace(experiment.loss_scale, maximum=float("inf"))
    experiment = dataclasses.replace(experiment, loss_scale=scale)
    first = train(experiment, tmp_path, name="mlp_bf16")
    assert train(experiment, tmp_path, name="mlp_bf16") == first


@pytest.mark.slow
def test_a_damaged_record_is_named_on_resume(tmp_path):
    train(small("mlp_bf16"), tmp_path, name="mlp_bf16")
    (tmp_path / "metrics.jsonl").write_text("nonsense\n{}\n")
    with pytest.raises(UsageError, match="line 1: expected a record, got 'nonsense'"):
        train(small("mlp_bf16", steps=60), tmp_path, name="mlp_bf16")


def test_a_signal_while_the_last_checkpoint_is_written_loses_nothing(tmp_path, monkeypatch):
    waited = Checkpoints.wait

    def with_signal(self):
        os.kill(os.getpid(), signal.SIGTERM)
        waited(self)

    monkeypatch.setattr(Checkpoints, "wait", with_signal)
    summary = train(small("mlp_bf16"), tmp_path, name="mlp_bf16")
    assert summary["steps"] == 40
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 40


@pytest.mark.slow
def test_more_steps_may_be_asked_of_a_run(tmp_path):
    train(small("mlp_bf16"), tmp_path, name="mlp_bf16")
    assert train(small("mlp_bf16", steps=60), tmp_path, name="mlp_bf16")["steps"] == 60
    with pytest.raises(UsageError, match="is at step 60; expected --steps of at least that"):
        train(small("mlp_bf16", steps=20), tmp_path, name="mlp_bf16")
    assert read_config(tmp_path)[1]["steps"] == 60


def test_another_experiment_or_other_settings_are_refused_and_nothing_is_lost(tmp_path):
    train(small("mlp_bf16"), tmp_path, name="mlp_bf16")
    config = (tmp_path / "config.json").read_text()
    with pytest.raises(UsageError, match="holds a run of 'mlp_bf16'"):
        train(small(), tmp_path, name="mlp_fp16")
    with pytest.raises(UsageError, match="other settings: batch_size 128 -> 64"):
        train(small("mlp_bf16", batch_size=64), tmp_path, name="mlp_bf16")
    assert (tmp_path / "config.json").read_text() == config


def test_a_diverging_run_says_so(tmp_path):
    experiment = small("mlp_fp32")
    optimizer = dataclasses.replace(
        experiment.optimizer, name="sgd", learning_rate=1e30, max_grad_norm=None, warmup_steps=0
    )
    with pytest.raises(Diverged, match="at step 10"):
        train(dataclasses.replace(experiment, optimizer=optimizer), tmp_path, name="mlp_fp32")


def test_an_fp16_run_survives_a_scale_that_is_too_large(tmp_path):
    experiment = small()
    scale = dataclasses.replace(experiment.loss_scale, initial=2.0**40)
    summary = train(dataclasses.replace(experiment, loss_scale=scale), tmp_path, name="mlp_fp16")
    assert summary["skipped_steps"] >= 10
    assert np.log2(summary["loss_scale"]) == int(np.log2(summary["loss_scale"]))


@pytest.mark.parametrize(
    "content,words",
    [
        (None, "is not a run directory"),
        ("", "is damaged: .*; expected it as the run wrote it"),
        ("[1]", "contains a list; expected an object"),
        ('{"steps": 3}', "cannot be read"),
    ],
)
def test_a_folder_that_holds_no_readable_run_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=words):
        read_config(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        train(small("mlp_bf16"), tmp_path / "file" / "run", name="mlp_bf16")


def test_a_nan_stops_a_run_that_names_the_step_and_the_newest_checkpoint(tmp_path):
    with pytest.raises(Diverged) as stop:
        train(poisoned(22), tmp_path, name="mlp_fp32")
    assert "the loss is nan at step 30; it began with step 23" in str(stop.value)
    assert "newest checkpoint: step 20" in str(stop.value)
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 20
    # The same command would meet the same batch; one that skips goes on from step 20.
    summary = train(poisoned(22, nonfinite="skip"), tmp_path, name="mlp_fp32")
    assert (summary["steps"], summary["skipped_steps"], summary["rollbacks"]) == (40, 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("per_call", [5, 1])
def test_rollback_resumes_from_the_checkpoint_after_the_bad_batch(tmp_path, per_call):
    experiment = poisoned(22, nonfinite="rollback", steps_per_call=per_call)
    summary = train(experiment, tmp_path, name="mlp_fp32")
    assert (summary["steps"], summary["skipped_steps"], summary["rollbacks"]) == (40, 0, 1)
    steps = [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["split"] == "train"]
    assert steps == [10, 20, 30, 40]
    # By hand: 20 steps, then on without the batches up to the bad one, 20 to 22.
    parts = build(dataclasses.replace(experiment, steps_per_call=1))
    state = first_state(experiment, parts)
    left_out = 3
    for i in (*range(20), *range(20 + left_out, 40 + left_out)):
        state, _ = parts.stepper.step(state, parts.batches[i])
    kept = final_arrays(tmp_path)
    for name, x in {".params": state.params, ".opt_state": state.opt_state}.items():
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(x)]
        assert leaves
        there = [v for k, v in kept.items() if name.strip(".") in k.split("]")[0]]
        assert len(there) == len(leaves)
        for mine, theirs in zip(leaves, there, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_two_bad_batches_after_one_checkpoint_are_both_passed(tmp_path):
    out = io.StringIO()
    experiment = poisoned(22, 24, nonfinite="rollback")
    summary = train(experiment, tmp_path, name="mlp_fp32", console=Console(file=out, width=200))
    assert (summary["steps"], summary["rollbacks"]) == (40, 2)
    # Step 22 of the second try has batch 24: the batches 20 to 24 are left out in the third.
    assert [
        n in out.getvalue() for n in ("skipping the next 3 batches", "skipping the next 5")
    ] == [True] * 2
    position = json.loads((tmp_path / "checkpoints/40/_CHECKPOINT_METADATA").read_text())
    assert position["custom_metadata"]["extra"]["data"] == state_at(45)


@pytest.mark.slow
def test_a_rollback_passes_over_a_checkpoint_that_was_damaged_meanwhile(tmp_path, monkeypatch):
    restore, calls = Checkpoints.restore_latest, []

    def damaging(self, *args, **options):
        calls.append(1)
        if len(calls) == 2:
            shutil.rmtree(tmp_path / "checkpoints" / "30" / "state")
        return restore(self, *args, **options)

    monkeypatch.setattr(Checkpoints, "restore_latest", damaging)
    summary = train(poisoned(33, nonfinite="rollback"), tmp_path, name="mlp_fp32")
    assert (summary["steps"], summary["rollbacks"]) == (40, 1)
    folders = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {"30", "40", "damaged-30"} <= folders


def test_a_run_that_is_rolled_back_too_often_stops(tmp_path, monkeypatch):
    monkeypatch.setattr("jmp_train.runs.rollback.MAX_ROLLBACKS", 2)
    experiment = poisoned(*range(3, 200), nonfinite="rollback")
    out = io.StringIO()
    with pytest.raises(Diverged, match="the loss is nan"):
        train(experiment, tmp_path, name="mlp_fp32", console=Console(file=out, width=200))
    assert re.findall(r"rolled back to step (\d+); skipping the next (\d+) b", out.getvalue()) == [
        ("0", "4"), ("0", "5"),
    ]  # fmt: skip


@pytest.mark.slow
def test_the_matmul_precision_reaches_the_compiled_step(tmp_path, monkeypatch):
    texts = []
    compiled = jax.stages.Lowered.compile

    def spy(self, *args, **options):
        texts.append(self.as_text())
        return compiled(self, *args, **options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", spy)
    for precision in ("default", "highest"):
        train(small("mlp_fp32", matmul_precision=precision), tmp_path / precision, name="mlp_fp32")
    assert "HIGHEST" not in texts[0] and "HIGHEST" in texts[1]


@pytest.mark.slow
def test_rules_give_modules_their_policies_and_the_run_its_loss_scale(tmp_path):
    rules = ("layers/0=bf16", "layers/1=float32", "**=mixed_float16")
    summary = train(small("mlp_fp32", rules=rules), tmp_path, name="mlp_fp32")
    assert summary["loss_scale"] > 1  # one rule computes in float16
    arrays = final_arrays(tmp_path)
    dtypes = {n: str(x.dtype) for n, x in arrays.items() if "params" in n and "kernel" in n}
    assert sorted(dtypes.values()) == ["bfloat16", "float32"]
    moments = [x for n, x in arrays.items() if "opt_state" in n and "kernel" in n]
    assert moments and all(x.dtype == np.float32 for x in moments)
    assert evaluate_run(tmp_path, small("mlp_fp32", rules=rules))["accuracy"] > 0.2


def test_a_rule_that_matches_nothing_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(
        UsageError, match=r"'layer/0' .* matches no module; the nearest are 'layers/"
    ):
        train(small("mlp_fp32", rules=("layer/0=bf16",)), tmp_path / "run", name="mlp_fp32")
    assert not list(tmp_path.iterdir())


def test_a_step_at_a_scale_of_one_is_replayed_at_one_though_the_scale_has_fallen_since():
    params = jnp.ones(2)
    scale = jt.DynamicLossScale(1.0, min_loss_scale=0.25)
    stepper = jt.make_step(lambda p, b: (p * b).sum(), optax.sgd(1.0), loss_scale=scale)
    state, info = stepper.step(stepper.init(params), jnp.full(2, jnp.inf))
    assert not info.finite and state.loss_scale.loss_scale == 0.5
    assert scale_of(state, float(info.loss_scale)).loss_scale == 1.0


def test_a_skipped_step_is_replayed_with_its_own_key_and_scale(tmp_path, monkeypatch):
    # The root's slope at 0 is infinite and its value is not, so that the loss tells the key.
    loss_fn = lambda p, b, *, key: (jnp.sqrt(p) * b).sum() * jax.random.uniform(key)
    scale = jt.DynamicLossScale(2.0**10)
    stepper = jt.make_step(loss_fn, optax.sgd(1.0), "float32", loss_scale=scale)
    state = stepper.init(jnp.array([0.0, 1.0]), key=jax.random.key(0))
    for _ in range(3):
        state, info = stepper.step(state, jnp.ones(2))
        assert not info.finite
    replayed = []
    monkeypatch.setattr("jmp_train.runs.investigate.replay", lambda *args: replayed.append(args))
    monkeypatch.setattr("jmp_train.runs.investigate.float32_gradients", lambda *args: None)
    (tmp_path / "metrics.jsonl").touch()
    parts = types.SimpleNamespace(
        task=None, dataset=types.SimpleNamespace(spec=DataSpec.of({"image": np.zeros((1, 64))}, 10))
    )
    checkpoints: Any = types.SimpleNamespace(steps=list)
    context = RunContext("mlp", small(), tmp_path, QUIET, False, parts, checkpoints, [], 0.0, 0)  # pyright: ignore
    last = LastCall(3, state, jnp.ones(2), float(info.loss_scale), skipped=True, bad=3)
    report = investigate(context, "diverged", last)
    assert report.problems == ()
    [(_, _, before, batch)] = replayed
    grads = step_gradients(loss_fn, get_precision("float32"))
    assert float(grads(before, batch).loss) == float(info.loss)
    assert state.loss_scale.loss_scale == 2.0**7 and before.loss_scale.loss_scale == 2.0**8


def test_a_run_without_a_loss_scale_is_replayed_without_one():
    stepper = jt.make_step(lambda p, b: (p * b).sum(), optax.sgd(1.0), skip_nonfinite=True)
    assert isinstance(scale_of(stepper.init(jnp.ones(2)), 1.0), jt.NoOpLossScale)
