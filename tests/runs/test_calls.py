"""Several steps in a call, arrays on the device, and what the records hold of each step."""

import dataclasses

import numpy as np
import pytest
from helpers.marks import slow
from helpers.saved_arrays import assert_same_arrays, final_arrays
from helpers.small_runs import poisoned, signal_at, small

from jmp_train.data import DigitsConfig
from jmp_train.optim import OptimizerConfig
from jmp_train.records.metrics import read_metrics
from jmp_train.runs.build import build, first_state
from jmp_train.runs.calls import compile_calls
from jmp_train.runs.signals import Stopped
from jmp_train.runs.train import train
from jmp_train.step.donation import Donating

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_steps_per_call_may_change_on_resume(tmp_path, monkeypatch, noise):
    fields = {"micro_batches": 4, "ema_decay": 0.9, "data": DigitsConfig(noise=noise)}
    experiment = small("mlp_fp16", steps_per_call=1, **fields)
    train(experiment, tmp_path / "whole", name="mlp_fp16")
    for stop, per_call in ((10, 10), (30, 5), (None, 1)):
        other = dataclasses.replace(experiment, steps_per_call=per_call)
        with monkeypatch.context() as patch:
            if stop is None:
                train(other, tmp_path / "cut", name="mlp_fp16")
                continue
            signal_at(patch, stop)
            with pytest.raises(Stopped):
                train(other, tmp_path / "cut", name="mlp_fp16")
    assert_same_arrays(*(final_arrays(tmp_path / d) for d in ("whole", "cut")))


def train_records(run):
    records = read_metrics(run / "metrics.jsonl")
    return [
        {k: v for k, v in r.items() if k != "steps_per_second"}
        for r in records
        if r["split"] == "train"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("noise,resident", [(0.0, True), (0.0, False), (0.2, True)])
def test_automatic_steps_per_call_gives_the_same_run_as_one(tmp_path, monkeypatch, noise, resident):
    fields = {"micro_batches": 4, "ema_decay": 0.9, "data": DigitsConfig(noise=noise)}
    experiment = small("mlp_fp16", **fields)
    one = dataclasses.replace(experiment, steps_per_call=1, data_on_device=False)
    train(one, tmp_path / "one", name="mlp_fp16")
    auto = dataclasses.replace(experiment, data_on_device=resident)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signal_at(patch, 10)
        train(auto, tmp_path / "auto", name="mlp_fp16")
    summary = train(auto, tmp_path / "auto", name="mlp_fp16")
    assert summary["steps_per_call"] == 10
    assert summary["data_on_device"] == (resident and not noise)
    assert_same_arrays(*(final_arrays(tmp_path / d) for d in ("one", "auto")))
    assert train_records(tmp_path / "auto") == train_records(tmp_path / "one")


@pytest.mark.slow
def test_arrays_on_the_device_are_not_in_checkpoints(tmp_path):
    train(small(data=DigitsConfig(noise=0.0)), tmp_path, name="mlp_fp16")
    kept = final_arrays(tmp_path)
    assert not [path for path, x in kept.items() if x.shape[:1] == (1438,)]
    assert sum(x.nbytes for x in kept.values()) < 1438 * 64 * 4


def test_automatic_steps_per_call_traces_the_step_twice():
    traced = []
    experiment = small(data=DigitsConfig(noise=0.0))
    parts = build(experiment)
    pure = parts.stepper.pure_step

    def counted(state, batch):
        traced.append(1)
        return pure(state, batch)

    stepper = parts.stepper._replace(
        step=Donating(counted), pure_step=counted, scan=parts.stepper.scan
    )
    state = first_state(experiment, parts)
    calls = compile_calls(experiment, parts._replace(stepper=stepper), state)
    batches = calls.iterate()
    for _ in range(3):
        state, _ = calls.call(state, next(batches))
    assert calls.steps == 10 and int(state.step) == 30
    assert len(traced) == 2  # to count its operations, and in the scan


def test_the_record_has_the_learning_rate_of_the_last_step(tmp_path):
    optimizer = OptimizerConfig(learning_rate=0.1, warmup_steps=20)
    experiment = dataclasses.replace(small("mlp_fp32"), optimizer=optimizer)
    train(experiment, tmp_path, name="mlp_fp32")
    rates = [
        r["learning_rate"]
        for r in read_metrics(tmp_path / "metrics.jsonl")
        if r["split"] == "train"
    ]
    # Step n has the rate of n - 1 updates: linear to step 20, then half a cosine over 20 steps.
    expected = [
        0.1 * 9 / 20,
        0.1 * 19 / 20,
        *(0.05 * (1 + np.cos(np.pi * n / 20)) for n in (9, 19)),
    ]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


@pytest.mark.slow
def test_skipped_steps_do_not_advance_the_recorded_learning_rate(tmp_path):
    optimizer = OptimizerConfig(learning_rate=0.1, schedule="linear")
    experiment = poisoned(2, 9, nonfinite="skip")
    experiment = dataclasses.replace(experiment, optimizer=optimizer)
    train(experiment, tmp_path, name="mlp_fp32")
    first, *_, last = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["split"] == "train"]
    assert first["averaged_steps"] == 8 and np.isfinite(float(first["loss"]))
    assert first["last_loss"] == "nan"  # step 10 was skipped
    # Of step 10, after 8 updates; of step 40, after 37.
    np.testing.assert_allclose(first["learning_rate"], 0.1 * (1 - 8 / 40), rtol=1e-5)
    np.testing.assert_allclose(last["learning_rate"], 0.1 * (1 - 37 / 40), rtol=1e-5)


@pytest.mark.parametrize("per_call", [5, slow(1)])
def test_recorded_metrics_are_means_over_the_window(tmp_path, per_call):
    experiment = small("mlp_fp32", steps_per_call=per_call, steps=20)
    train(experiment, tmp_path, name="mlp_fp32")
    parts = build(experiment)
    state, losses, correct = first_state(experiment, parts), [], []
    for n in range(20):  # the step by itself, and means in float64
        state, info = parts.stepper.step(state, parts.batches[n])
        losses.append(np.float64(info.loss))
        correct.append(np.float64(info.aux["accuracy"]))
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["split"] == "train"]
    for record, end in zip(records, (10, 20), strict=True):
        np.testing.assert_allclose(record["loss"], np.mean(losses[end - 10 : end]), rtol=1e-14)
        np.testing.assert_allclose(record["accuracy"], np.mean(correct[end - 10 : end]), rtol=1e-14)
        assert record["last_loss"] == losses[end - 1] and record["averaged_steps"] == 10
