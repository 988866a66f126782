"""Evaluation of a run."""

from __future__ import annotations

from pathlib import Path

from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.warmup import fit_warmup
from jmp_train.runs.build import build, matmul_precision
from jmp_train.runs.resume import restore_newest
from jmp_train.types import Json


def evaluate_run(run_dir: Path, experiment: AnyExperiment) -> Json:
    """Evaluate the newest checkpoint of a run on its held-out data.

    Args:
      run_dir: the directory of the run.
      experiment: what was trained, with the settings that `read_config` returns.

    Returns:
      `{"step": ..., metric: ...}`.

    Raises:
      UsageError: if the run has no checkpoint, or the newest one does not match the model.
      NoUsableCheckpoint: if none can be loaded.
    """
    experiment, _ = fit_warmup(experiment)
    with matmul_precision(experiment.matmul_precision):
        parts = build(experiment)
        restored = restore_newest(run_dir, experiment, parts)
        return {"step": restored.step, **parts.evaluate(restored.state)}
