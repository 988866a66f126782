"""Hooks of a run: early stopping, on_record, own schedules and trackers, resumed to the bit."""

import dataclasses
import json
import os
import signal

import numpy as np
import optax
import pytest
from helpers.saved_arrays import assert_same_arrays, final_arrays
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jmp_train.config.early_stop import EarlyStopConfig
from jmp_train.config.find import find_experiment
from jmp_train.errors import UsageError
from jmp_train.optim import OptimizerConfig
from jmp_train.records.checkpoints import Checkpoints
from jmp_train.records.metrics import read_metrics
from jmp_train.runs.directory import read_config, run_id
from jmp_train.runs.early_stop import EarlyStop
from jmp_train.runs.signals import Stopped
from jmp_train.runs.train import train

QUIET = Console(quiet=True)
pytestmark = pytest.mark.usefixtures("quick_runs")

# No loss improves by 100, so that the first evaluation stays the best: three more end the run.
NEVER_BETTER = EarlyStopConfig("loss", patience=3, min_delta=100.0)


def small(**fields):
    experiment = find_experiment("mlp_fp16")
    fields = {"steps": 100, "log_every": 5, "eval_every": 10, "checkpoint_every": 15} | fields
    return dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, hidden=(16,), dropout=0.25),
        **{"optimizer": dataclasses.replace(experiment.optimizer, warmup_steps=5)} | fields,
    )


def run(run_dir, experiment, **options):
    return train(experiment, run_dir, name="mlp_fp16", **options)


def falling(monkeypatch, *values):
    """Evaluations give these accuracies, then the last one for ever."""
    left = list(values)
    metrics = lambda *_: {"accuracy": left.pop(0) if left[1:] else left[0], "loss": 1.0}
    monkeypatch.setattr("jmp_train.runs.build.make_evaluate", lambda *_, **__: metrics)


def steps_in(run_dir, split):
    records = read_metrics(run_dir / "metrics.jsonl")
    return [record["step"] for record in records if record["split"] == split]


def stop_at(step):
    """An `on_record` that sends SIGTERM at the train record of a step, once."""
    left = [step]

    def on_record(record, state):
        if [record["step"]] == left:
            os.kill(os.getpid(), signal.SIGTERM)
            left.clear()

    return on_record


@given(
    st.lists(st.floats(-2, 2) | st.just(float("nan")), max_size=12),
    st.floats(0, 1), st.integers(1, 4), st.booleans(),
)  # fmt: skip
def test_early_stop_matches_a_search_through_all_values(values, min_delta, patience, highest):
    config = EarlyStopConfig("loss", patience=patience, min_delta=min_delta)
    state, seen = EarlyStop(), []
    for step, value in enumerate(values):
        state = state.after(config, step, value, highest=highest)
        seen.append(value)
    # A second algorithm: from each improvement, search the next.
    best = None
    for at, value in enumerate(seen):
        if not np.isnan(value) and (
            best is None or (value - seen[best]) * (1 if highest else -1) > min_delta
        ):
            best = at
    since = len(seen) - 1 - best if best is not None else len(seen)
    assert state.since == since and bool(state.reason(config)) == (since >= patience)
    assert state.best == (None if best is None else seen[best])


def test_run_ends_when_the_metric_stops_improving(tmp_path, monkeypatch):
    falling(monkeypatch, 0.5, 0.7, 0.6, 0.65, 0.69)
    early = EarlyStopConfig("accuracy", patience=2)
    summary = run(tmp_path, small(early_stop=early))
    assert summary["steps"] == 40 and summary["eval"]["accuracy"] == 0.65
    reason = "accuracy has not improved in 2 evaluations (best 0.7 at 20)"
    assert summary["stopped_early"] == {"by": "early_stop", "step": 40, "reason": reason}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    # The best one is kept, though 20 is no multiple of checkpoint_every.
    assert Checkpoints(tmp_path / "checkpoints").steps() == [20, 30, 40]


@pytest.mark.slow
def test_run_without_early_stopping_says_so(tmp_path):
    assert run(tmp_path, small(steps=20))["stopped_early"] is None


@pytest.mark.parametrize(
    "early,highest",
    [
        (EarlyStopConfig("accuracy"), True),
        (EarlyStopConfig("loss"), False),
        (EarlyStopConfig("eval_error"), False),
        (EarlyStopConfig("f1"), True),
        (EarlyStopConfig("lossless"), True),
        (EarlyStopConfig("f1", best="lowest"), False),
        (EarlyStopConfig("accuracy", best="lowest"), False),
    ],
)
def test_direction_of_a_metric_is_inferred_from_task_and_name(early, highest):
    assert early.highest("accuracy", True) == highest


@pytest.mark.slow
def test_stopped_run_resumes_bitwise_to_the_same_early_stop(tmp_path):
    whole = run(tmp_path / "whole", small(early_stop=NEVER_BETTER))
    assert whole["steps"] == 40
    cut = small(early_stop=NEVER_BETTER, on_record=stop_at(25))
    with pytest.raises(Stopped):
        run(tmp_path / "cut", cut)
    assert run(tmp_path / "cut", cut)["stopped_early"] == whole["stopped_early"]
    assert_same_arrays(final_arrays(tmp_path / "whole"), final_arrays(tmp_path / "cut"))
    assert steps_in(tmp_path / "cut", "eval") == steps_in(tmp_path / "whole", "eval")


@pytest.mark.slow
def test_early_stopped_run_is_finished_until_its_settings_change(tmp_path):
    experiment = small(early_stop=NEVER_BETTER)
    first = run(tmp_path, experiment)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert run(tmp_path, experiment) == first
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    patient = dataclasses.replace(NEVER_BETTER, patience=5)
    assert run(tmp_path, small(early_stop=patient))["steps"] == 60
    off = run(tmp_path, small(early_stop=EarlyStopConfig()))
    assert (off["steps"], off["stopped_early"]) == (100, None)


@pytest.mark.slow
def test_early_stopped_run_trains_on_with_more_steps(tmp_path):
    run(tmp_path, small(early_stop=NEVER_BETTER))
    summary = run(tmp_path, small(early_stop=NEVER_BETTER, steps=120))
    assert summary["steps"] == 50  # the next evaluation is again none that improves


@pytest.mark.slow
def test_lost_summary_of_an_early_stopped_run_is_written_again(tmp_path):
    first = run(tmp_path, small(early_stop=NEVER_BETTER))
    (tmp_path / "summary.json").unlink()
    again = run(tmp_path, small(early_stop=NEVER_BETTER))
    assert all(again[k] == first[k] for k in ("steps", "eval", "stopped_early"))


def test_unknown_metric_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="early_stop.metric is 'los'; did you mean 'loss'"):
        run(tmp_path / "run", small(early_stop=EarlyStopConfig("los")))
    assert not (tmp_path / "run").exists()


def test_on_record_gets_every_record_and_the_state(tmp_path):
    seen = []

    def on_record(record, state):
        seen.append((record, int(state.step), type(state).__name__))

    run(tmp_path, small(steps=20, on_record=on_record))
    written = read_metrics(tmp_path / "metrics.jsonl")
    assert [record for record, _, _ in seen] == written and len(written) == 6
    assert all(step == record["step"] for record, step, _ in seen)
    assert {name for _, _, name in seen} == {"TrainState"}


def test_on_record_ends_the_run_with_checkpoint_and_metrics(tmp_path):
    def on_record(record, state):
        return "stop" if record["step"] >= 25 else None

    summary = run(tmp_path, small(on_record=on_record))
    assert summary["steps"] == 25 and summary["eval"]["accuracy"] > 0
    reason = "on_record returned 'stop'"
    assert summary["stopped_early"] == {"by": "on_record", "step": 25, "reason": reason}
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 25
    assert steps_in(tmp_path, "eval")[-1] == 25
    assert run(tmp_path, small()) == summary  # it is finished
    assert run(tmp_path, small(), force=True)["steps"] == 100


@pytest.mark.slow
def test_exception_in_on_record_is_raised_after_saving(tmp_path):
    def on_record(record, state):
        if record["step"] == 20 and record["split"] == "train":
            raise ZeroDivisionError("mine")

    run(tmp_path / "whole", small(steps=40))
    with pytest.raises(ZeroDivisionError, match="mine"):
        run(tmp_path / "cut", small(steps=40, on_record=on_record))
    assert Checkpoints(tmp_path / "cut" / "checkpoints").steps()[-1] == 20
    run(tmp_path / "cut", small(steps=40))
    assert_same_arrays(final_arrays(tmp_path / "whole"), final_arrays(tmp_path / "cut"))
    assert steps_in(tmp_path / "cut", "eval") == steps_in(tmp_path / "whole", "eval")
    assert steps_in(tmp_path / "cut", "train") == steps_in(tmp_path / "whole", "train")


def test_other_answers_of_on_record_are_errors(tmp_path):
    with pytest.raises(ValueError, match="on_record returned True; expected None or 'stop'"):
        run(tmp_path, small(on_record=lambda record, state: True))


@pytest.mark.slow
def test_own_schedule_gives_the_same_run_as_the_bundled_one(tmp_path):
    bundled = OptimizerConfig(learning_rate=2e-3, schedule="constant")
    run(tmp_path / "bundled", small(steps=20, optimizer=bundled))
    own = small(steps=20, optimizer=OptimizerConfig(), schedule=optax.constant_schedule(2e-3))
    run(tmp_path / "own", own)
    assert_same_arrays(final_arrays(tmp_path / "bundled"), final_arrays(tmp_path / "own"))
    assert "schedule" not in read_config(tmp_path / "own")[1]


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"schedule": 0.1}, "schedule is 0.1; expected a function"),
        ({"schedule": lambda n: 0.1}, "optimizer.learning_rate is 0.002; expected it unset"),
        ({"on_record": "stop"}, "on_record is 'stop'; expected a function"),
        ({"own_trackers": (print,)}, "expected objects with methods start, record and finish"),
        ({"trackers": ("tensorbord",)}, "trackers is .*expected a tuple, each one of tensorboard"),
    ],
)
def test_invalid_hook_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


class Broken:
    """A tracker without a network."""

    def start(self, config):
        raise ConnectionError("no network")

    def record(self, step, split, values):
        raise AssertionError("not called")

    def finish(self, summary):
        raise AssertionError("not called")


class Kept:
    """A tracker that keeps its calls."""

    def __init__(self):
        self.starts, self.records, self.summaries = [], [], []

    def start(self, config):
        self.starts.append(config)

    def record(self, step, split, values):
        self.records.append((step, split))

    def finish(self, summary):
        self.summaries.append(summary)


@pytest.mark.slow
def test_own_trackers_follow_a_run_through_a_resume(tmp_path, caplog):
    kept = Kept()
    experiment = small(steps=20, trackers=("csv",), own_trackers=(Broken(), kept))
    with pytest.raises(Stopped):
        run(tmp_path, dataclasses.replace(experiment, on_record=stop_at(5)))
    summary = run(tmp_path, experiment)
    assert caplog.text.count("tracker Broken ends here: ConnectionError in start: no network") == 2
    at = kept.starts[1]["run"]["step"]
    assert [c["run"] for c in kept.starts] == [
        {"id": run_id(tmp_path), "directory": str(tmp_path), "step": step} for step in (0, at)
    ]
    assert kept.starts[0]["experiment"] == "mlp_fp16" and "own_trackers" not in kept.starts[0]
    assert kept.summaries == [kept.summaries[0], summary] and kept.summaries[0]["steps"] == at
    assert kept.records == [
        (r["step"], r["split"]) for r in read_metrics(tmp_path / "metrics.jsonl")
    ]
    assert (tmp_path / "metrics.csv").exists() and not (tmp_path / "tensorboard").exists()


def test_tracker_is_finished_without_a_summary_after_an_error(tmp_path):
    kept = Kept()
    with pytest.raises(ValueError, match="on_record returned"):
        run(tmp_path, small(own_trackers=(kept,), on_record=lambda *_: 1))
    assert kept.summaries == [{}]


def test_directory_of_a_version_without_hooks_resumes(tmp_path):
    run(tmp_path, small(steps=20))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for field in ("trackers", "early_stop"):
        del config[field]
    del config["optimizer"]["power"]
    path.write_text(json.dumps(config))
    assert run(tmp_path, small(steps=20))["steps"] == 20
    with pytest.raises(UsageError, match="other settings: optimizer.power 2.0 -> 3.0"):
        optimizer = dataclasses.replace(small().optimizer, power=3.0)
        run(tmp_path, small(steps=20, optimizer=optimizer))
