"""Warm-up steps that fit the length of a run."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from jmp_train.config.experiment import Experiment

E = TypeVar("E", bound="Experiment[Any, Any]")


def fit_warmup(experiment: E) -> tuple[E, str]:
    """Scale a warm-up that is not shorter than its run to a tenth of the run.

    Args:
      experiment: whose `steps` may have been lowered without a thought of the warm-up.

    Returns:
      The experiment, changed only where its warm-up does not fit, and a line that says what changed;
      "" if nothing did.

    >>> from jmp_train.data import DigitsConfig
    >>> from jmp_train.models import MlpConfig
    >>> optimizer = OptimizerConfig(warmup_steps=100)
    >>> experiment = Experiment(MlpConfig(), DigitsConfig(), steps=60, optimizer=optimizer)
    >>> fitted, line = fit_warmup(experiment)
    >>> fitted.optimizer.warmup_steps
    6
    >>> print(line)
    warm-up scaled from 100 to 6 steps, a tenth of the run's 60 steps
    """
    asked, steps = experiment.optimizer.warmup_steps, experiment.steps
    scaled = fitting_warmup(asked, steps)
    if scaled == asked:
        return experiment, ""
    optimizer = dataclasses.replace(experiment.optimizer, warmup_steps=scaled)
    line = f"warm-up scaled from {asked} to {scaled} steps, a tenth of the run's {steps} steps"
    return dataclasses.replace(experiment, optimizer=optimizer), line


def fitting_warmup(warmup_steps: int, steps: int) -> int:
    """Return a warm-up that is shorter than its run as it is, and a tenth of the run for any other.

    >>> fitting_warmup(100, 1000), fitting_warmup(100, 60)
    (100, 6)
    """
    return warmup_steps if warmup_steps < steps else steps // 10
