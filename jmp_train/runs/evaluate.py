"""Evaluation of a run."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.warmup import fit_warmup
from jmp_train.reports.stages import stage
from jmp_train.runs.build import build, matmul_precision
from jmp_train.runs.check_evaluation import check_evaluation
from jmp_train.runs.devices import on_this_machine
from jmp_train.runs.resume import restore_newest
from jmp_train.types import Json


def evaluate_run(run_dir: Path, experiment: AnyExperiment, console: Console | None = None) -> Json:
    """Evaluate the newest checkpoint of a run on its held-out data.

    Args:
      run_dir: the directory of the run.
      experiment: what was trained, with the settings that `read_config` returns.
      console: where to show what is done; None shows nothing.

    Returns:
      `{"step": ..., metric: ...}`.

    Raises:
      UsageError: if the run has no checkpoint, if the newest one does not match the model, or if the
        held-out data cannot be evaluated.
      NoUsableCheckpoint: if none can be loaded.
    """
    console = Console(quiet=True) if console is None else console
    experiment, _ = fit_warmup(on_this_machine(experiment))
    with matmul_precision(experiment.matmul_precision):
        with stage(console, "loading data"):
            parts = build(experiment, run_dir)
        check_evaluation(experiment, parts)
        with stage(console, "restoring a checkpoint"):
            restored = restore_newest(run_dir, experiment, parts)
        with stage(console, "evaluating"):
            metrics = parts.evaluate(restored.state)
        return {"step": restored.step, **metrics}
