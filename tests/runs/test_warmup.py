"""A run shorter than its warm-up: scaled where the experiment set it, refused where the user did."""

import dataclasses
import io
import json
import os
import signal

import pytest
from helpers.saved_arrays import assert_same_arrays, final_arrays
from rich.console import Console

from jmp_train.cli.main import main
from jmp_train.config.find import find_experiment
from jmp_train.config.warmup import fit_warmup
from jmp_train.errors import UsageError
from jmp_train.optim import OptimizerConfig, make_schedule
from jmp_train.records.checkpoints import Checkpoints
from jmp_train.reports.progress import RunProgress
from jmp_train.runs.evaluate import evaluate_run
from jmp_train.runs.signals import Stopped
from jmp_train.runs.train import train

pytestmark = pytest.mark.usefixtures("quick_runs")
SMALL = ("--model.hidden", "4", "--log-every", "10", "--compilation-cache", "False")


def run(capsys, *words):
    status = main(words)
    return status, *capsys.readouterr()


def config_of(run_dir):
    return json.loads((run_dir / "config.json").read_text())


def small(steps, **fields):
    """mlp_fp32, whose warm-up is 100 steps, with a small model."""
    experiment = find_experiment("mlp_fp32")
    assert experiment.optimizer.warmup_steps == 100
    model = dataclasses.replace(experiment.model, hidden=(4,))
    return dataclasses.replace(
        experiment, model=model, steps=steps, log_every=10, checkpoint_every=10, **fields
    )


def test_a_short_run_scales_its_warmup_and_says_so(capsys, tmp_path):
    words = ("train", "mlp_bf16", *SMALL, "--steps", "60", "--run-dir", str(tmp_path / "run"))
    status, out, err = run(capsys, *words)
    assert status == 0, err
    assert config_of(tmp_path / "run")["optimizer"]["warmup_steps"] == 6
    (line,) = [line for line in out.splitlines() if "warm-up" in line]
    assert "100" in line and " 6 " in line and "60" in line


@pytest.mark.parametrize("steps,warmup", [(1, 0), (9, 0), (10, 1), (100, 10), (101, 100)])
def test_a_scaled_warmup_is_a_tenth_of_the_run(steps, warmup):
    experiment, note = fit_warmup(small(steps))
    assert experiment.optimizer.warmup_steps == warmup
    assert bool(note) == (warmup != 100)
    assert fit_warmup(experiment) == (experiment, "")


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", "60", "--optimizer.warmup-steps", "100"],
        ["--optimizer.warmup_steps=100", "--steps=60"],
    ],
)
def test_a_contradiction_is_refused_with_a_value_that_works(capsys, tmp_path, words):
    run_dir = ("--run-dir", str(tmp_path / "run"))
    status, _, err = run(capsys, "train", "mlp_bf16", *SMALL, *words, *run_dir)
    assert status == 2 and err.count("\n") == 1
    assert "--optimizer.warmup-steps is 100; expected fewer than --steps (60)" in err
    assert err.endswith("such as --optimizer.warmup-steps 6\n")
    assert not (tmp_path / "run").exists()
    remedy = [*words, "--optimizer.warmup-steps", "6"]
    assert run(capsys, "train", "mlp_bf16", *SMALL, *remedy, *run_dir)[0] == 0


@pytest.mark.slow
def test_a_comparison_scales_and_says_so_once(capsys, tmp_path):
    out_dir = tmp_path / "out"
    words = ("--steps", "20", "--seeds", "1", "--precisions", "fp32,bf16", "--out", str(out_dir))
    status, out, err = run(capsys, "compare", "mlp", *SMALL, *words)
    assert status == 0, err
    assert out.count("warm-up") == 1
    for folder in (out_dir / "runs").iterdir():
        assert config_of(folder)["optimizer"]["warmup_steps"] == 2


@pytest.mark.slow
def test_a_stopped_short_run_resumes_bitwise(tmp_path, monkeypatch):
    train(small(40), tmp_path / "whole", name="mlp_fp32")

    def stop(self, step, values):
        if step == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunProgress, "train", stop)
        with pytest.raises(Stopped):
            train(small(40), tmp_path / "cut", name="mlp_fp32")
    assert Checkpoints(tmp_path / "cut" / "checkpoints").steps()[-1] < 40
    train(small(40), tmp_path / "cut", name="mlp_fp32")
    assert_same_arrays(final_arrays(tmp_path / "whole"), final_arrays(tmp_path / "cut"))
    assert config_of(tmp_path / "cut")["optimizer"]["warmup_steps"] == 4


@pytest.mark.slow
def test_more_steps_take_up_the_longer_runs_schedule(tmp_path):
    run_dir, out = tmp_path / "run", io.StringIO()
    train(small(40), run_dir, name="mlp_fp32")
    train(small(400), run_dir, name="mlp_fp32", console=Console(file=out, width=200))
    assert "optimizer.warmup_steps 4 -> 100" in out.getvalue()
    assert "steps 40 -> 400" in out.getvalue()
    assert config_of(run_dir)["optimizer"]["warmup_steps"] == 100


@pytest.mark.parametrize("first,then", [(5, 100), (100, 5)])
@pytest.mark.slow
def test_another_warmup_of_a_run_is_refused(tmp_path, first, then):
    def warming(steps):
        optimizer = dataclasses.replace(small(200).optimizer, warmup_steps=steps)
        return small(200, optimizer=optimizer)

    train(warming(first), tmp_path / "run", name="mlp_fp32")
    with pytest.raises(UsageError, match=f"optimizer.warmup_steps {first} -> {then}; expected"):
        train(warming(then), tmp_path / "run", name="mlp_fp32")


@pytest.mark.slow
def test_fewer_steps_after_a_stop_scale_the_warmup(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            RunProgress,
            "train",
            lambda self, step, values: step == 20 and os.kill(os.getpid(), signal.SIGTERM),
        )
        with pytest.raises(Stopped):
            train(small(400), tmp_path / "run", name="mlp_fp32")
    assert train(small(60), tmp_path / "run", name="mlp_fp32")["steps"] == 60
    assert config_of(tmp_path / "run")["optimizer"]["warmup_steps"] == 6


@pytest.mark.slow
def test_a_scaled_run_evaluates_as_it_was_trained(capsys, tmp_path):
    run_dir = tmp_path / "run"
    summary = train(small(20), run_dir, name="mlp_fp32")
    assert evaluate_run(run_dir, small(20)) == {"step": 20, **summary["eval"]}
    status, out, err = run(capsys, "eval", str(run_dir))
    assert status == 0 and out.startswith("step 20  "), err


def test_the_library_refuses_a_warmup_longer_than_the_run():
    with pytest.raises(ValueError, match=r"optimizer.warmup_steps is 100; expected fewer .*\(60\)"):
        make_schedule(OptimizerConfig(warmup_steps=100), 60)
