"""Runs that are interrupted: locks, signals, other settings, damage and full disks."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.marks import slow
from helpers.saved_arrays import assert_same_arrays, final_arrays
from rich.console import Console

from jmp_train.cli.main import main
from jmp_train.config.find import find_experiment
from jmp_train.data.batches import iterate, train_batches
from jmp_train.errors import UsageError
from jmp_train.records.checkpoints import Checkpoints, NotSaved
from jmp_train.records.metrics import read_metrics
from jmp_train.records.provenance import package_versions
from jmp_train.reports.progress import RunProgress
from jmp_train.runs.signals import collect_signals
from jmp_train.runs.train import train

ROOT = Path(__file__).resolve().parents[2]
QUIET = Console(quiet=True)
NAME = "linear_bf16"
pytestmark = pytest.mark.usefixtures("quick_runs")


def small(**fields):
    """Checkpoints at the steps 4, 8 and 12, the last."""
    experiment = find_experiment(NAME)
    optimizer = dataclasses.replace(experiment.optimizer, warmup_steps=2)
    optimizer = fields.pop("optimizer", optimizer)
    fields = {"steps": 12, "log_every": 2, "eval_every": 6, "checkpoint_every": 4, **fields}
    return dataclasses.replace(experiment, optimizer=optimizer, **fields)


@pytest.fixture(scope="module")
def finished(quick_runs, tmp_path_factory):
    """A finished run, to copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(small(), folder, name=NAME)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def at_step(monkeypatch, actions):
    """Does something when the record of a step is shown."""
    shown = RunProgress.train

    def then(self, step, values):
        shown(self, step, values)
        actions.get(step, lambda: None)()

    monkeypatch.setattr(RunProgress, "train", then)


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def losses(run):
    return [(r["step"], r["split"], r["loss"]) for r in read_metrics(run / "metrics.jsonl")]


# Two processes


def test_a_directory_in_use_is_refused_with_its_holder_and_left_alone(run):
    (run / "lock").write_text("process 123 on node4\n")
    before = files_of(run)
    with (run / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="run is in use by process 123 on node4; wait"):
            train(small(steps=16), run, name=NAME)
    assert files_of(run) == before
    assert train(small(steps=16), run, name=NAME)["steps"] == 16


def test_where_locks_do_not_work_a_line_says_so(run, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    assert train(small(), run, name=NAME, console=console)["steps"] == 12
    assert "cannot be locked ([Errno 37] No locks available); make sure" in console.export_text()


def test_a_run_holds_its_lock_until_its_end(tmp_path, monkeypatch):
    seen = []

    def look():
        seen.append((tmp_path / "lock").read_text())
        with pytest.raises(UsageError, match=f"in use by process {os.getpid()} on "):
            train(small(), tmp_path, name=NAME)

    at_step(monkeypatch, {4: look})
    train(small(), tmp_path, name=NAME)
    assert seen and (tmp_path / "lock").read_text() == ""


def test_a_process_killed_before_its_first_record_leaves_a_run_that_begins(tmp_path, monkeypatch):
    def killed(*_, **__):
        raise SystemExit

    for function in ("write_config", "open_checkpoints", "compile_calls"):
        with monkeypatch.context() as patch:
            patch.setattr(f"jmp_train.runs.train.{function}", killed)
            with pytest.raises(SystemExit):
                train(small(), tmp_path, name=NAME)
        (tmp_path / "config.json.partial").write_text('{"exp')
    assert train(small(), tmp_path, name=NAME)["steps"] == 12


# Signals


@pytest.mark.parametrize(
    "signum,status", [("SIGTERM", 143), slow("SIGINT", 130), slow("SIGUSR1", 138)]
)
def test_a_signal_ends_a_run_with_its_status_and_the_state_saved(
    tmp_path, monkeypatch, capsys, signum, status
):
    at_step(monkeypatch, {6: lambda: os.kill(os.getpid(), getattr(signal, signum))})
    words = ["--steps", "12", "--log-every", "2", "--checkpoint-every", "4", "--eval-every", "6"]
    more = ["--optimizer.warmup-steps", "2", "--run-dir", str(tmp_path), "--steps-per-call", "1"]
    assert main(["train", NAME, *words, *more]) == status
    assert f"stopped by {signum} at step 7" in capsys.readouterr().err
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 7
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 7]
    assert (tmp_path / "lock").read_text() == ""


def test_a_second_signal_of_any_kind_has_its_usual_effect(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("usual"))
    try:
        with collect_signals() as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
            assert (stopped, seen) == ([signal.SIGTERM], [])
            os.kill(os.getpid(), signal.SIGUSR1)
            assert (stopped, seen) == ([signal.SIGTERM], ["usual"])
    finally:
        signal.signal(signal.SIGUSR1, before)


# Other settings, versions and checkpoints


def test_other_versions_are_told(run, monkeypatch):
    there = package_versions()["jax"]
    now = {**package_versions(), "jax": "99.0"}
    monkeypatch.setattr("jmp_train.runs.resume.package_versions", lambda: now)
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    train(small(), run, name=NAME, console=console)
    assert f"saved by other versions: jax {there} -> 99.0\n" in console.export_text()


def test_a_checkpoint_of_another_experiment_is_refused_and_nothing_is_lost(run, tmp_path):
    train(small(seed=1), tmp_path / "other", name=NAME)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "12", run / "checkpoints" / "16")
    before = files_of(run)
    with pytest.raises(UsageError, match=r"checkpoints/16 was saved .*: seed 1 -> 0; move it away"):
        train(small(steps=20), run, name=NAME)
    assert files_of(run) == before


def test_changed_batch_size_needs_force_and_reorders_the_batches(run, monkeypatch):
    experiment = small(batch_size=64, steps=16, steps_per_call=1)
    with pytest.raises(UsageError, match="batch_size 128 -> 64; .* or --force"):
        train(experiment, run, name=NAME)
    seen = []

    def spy(*arguments):
        iterator = iterate(*arguments)
        take = type(iterator).__next__

        class Spied:
            get_state, set_state, skip = iterator.get_state, iterator.set_state, iterator.skip
            can_seek, close = iterator.can_seek, iterator.close
            bad = property(lambda self: iterator.bad)

            def __next__(self):
                seen.append(take(iterator))
                return seen[-1]

        return Spied()

    monkeypatch.setattr("jmp_train.runs.calls.iterate", spy)
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    train(experiment, run, name=NAME, console=console, force=True)
    said = console.export_text()
    assert "changed: batch_size 128 -> 64, steps 12 -> 16, steps_per_call None -> 1\n" in said
    assert "other batches from step 12 on, for batch_size changed\n" in said
    batches = train_batches(experiment.data.load().train, 64, seed=0)
    assert len(seen) == 4
    for n, batch in enumerate(seen):
        for name, array in batches[12 + n].items():
            np.testing.assert_array_equal(batch[name], array)
    assert train(dataclasses.replace(experiment, steps=20), run, name=NAME)["steps"] == 20


@pytest.mark.slow
def test_a_forced_policy_resumes_and_another_model_does_not(run):
    assert train(small(policy="float32", steps=14), run, name=NAME, force=True)["steps"] == 14
    before = files_of(run)
    with pytest.raises(UsageError, match="does not match the state: "):
        other = dataclasses.replace(small().model, hidden=(9,))
        train(small(policy="float32", steps=16, model=other), run, name=NAME, force=True)
    assert files_of(run) == before
    optimizer = dataclasses.replace(small().optimizer, parameters="kahan")
    narrow = small(policy="bf16", steps=16, optimizer=optimizer)
    assert train(narrow, run, name=NAME, force=True)["steps"] == 16


# A full disk


@contextlib.contextmanager
def full_disk(run_dir, after=4):
    """From when a checkpoint is whole: no file may grow, every write beyond a byte fails."""
    while not (run_dir / "checkpoints" / str(after)).exists():
        time.sleep(0.01)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint_and_no_record(
    tmp_path, finished, monkeypatch, caplog, capfd
):
    with contextlib.ExitStack() as full:
        at_step(monkeypatch, {6: lambda: full.enter_context(full_disk(tmp_path)), 10: full.close})
        assert train(small(), tmp_path, name=NAME)["steps"] == 12
    assert "checkpoint 8 could not be saved: " in caplog.text
    assert "metrics.jsonl cannot be written, and waits: File too large" in caplog.text
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 12]
    assert losses(tmp_path) == losses(finished)
    assert_same_arrays(final_arrays(tmp_path), final_arrays(finished))
    assert "Traceback" not in capfd.readouterr().err


def test_full_disk_error_names_the_checkpoint_to_resume_from(tmp_path, finished, monkeypatch):
    with contextlib.ExitStack() as full, monkeypatch.context() as patch:
        at_step(patch, {6: lambda: full.enter_context(full_disk(tmp_path))})
        with pytest.raises(NotSaved, match="^checkpoint 12 could .* checkpoint is that of step 4$"):
            train(small(), tmp_path, name=NAME)
        with pytest.raises(UsageError, match="cannot be written: File too large"):
            train(small(), tmp_path, name=NAME)
    assert train(small(), tmp_path, name=NAME)["steps"] == 12
    assert losses(tmp_path) == losses(finished)
    assert_same_arrays(final_arrays(tmp_path), final_arrays(finished))


def test_a_summary_that_cannot_be_written_is_written_by_the_next_call(run, monkeypatch):

    waited = Checkpoints.wait
    with contextlib.ExitStack() as full:

        def then_full(self):
            waited(self)
            full.enter_context(full_disk(run, after=16))

        with (
            monkeypatch.context() as patch,
            pytest.raises(NotSaved, match="summary.json .* step 16"),
        ):
            patch.setattr(Checkpoints, "wait", then_full)
            train(small(steps=16), run, name=NAME)
    assert not (run / "summary.json").exists()
    assert train(small(steps=16), run, name=NAME)["steps"] == 16
    assert json.loads((run / "summary.json").read_text())["steps"] == 16


@pytest.mark.slow
def test_the_command_on_a_full_disk_says_a_line_for_each_failure_and_exits_with_4(tmp_path):
    code = (
        "import resource, sys; from jmp_train.cli.main import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY));"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ["train", NAME, "--run-dir", tmp_path / "run", "--steps", "60", "--log-every", "1"]
    words += ["--checkpoint-every", "10", "--optimizer.warmup-steps", "2", "--eval-every", "30"]
    words += ["--compilation-cache", "False"]  # it lies elsewhere
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        capture_output=True,
        timeout=300,
        check=False,
    )
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 4, lines
    ours = ("jmp-train: ", "WARNING:jmp_train.")
    assert [line for line in lines if not line.startswith(ours)] == []
    assert lines[-1].startswith("jmp-train: checkpoint 60 could not be saved")
    done = subprocess.run(
        [sys.executable, "-m", "jmp_train", *words],
        cwd=ROOT,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0
    steps = [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert sorted({*steps}) == [*range(1, 61)]
