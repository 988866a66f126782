"""Warm-up steps that fit into a run."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from jmp_train.config.experiment import AnyExperiment

E = TypeVar("E", bound="AnyExperiment")


def fit_warmup(experiment: E) -> tuple[E, str]:
    """Scale the warm-up to a tenth of the run if it is not shorter than the run.

    Args:
      experiment: an experiment whose `steps` may be lower than its warm-up allows.

    Returns:
      The experiment, changed only if its warm-up does not fit, and a line that describes the change;
      "" if nothing changed.

    >>> from jmp_train.config import Experiment
    >>> from jmp_train.data import DigitsConfig
    >>> from jmp_train.models import Mlp, Model
    >>> from jmp_train.optim import OptimizerConfig
    >>> optimizer = OptimizerConfig(warmup_steps=100)
    >>> model = Model(Mlp, inputs=64, outputs=10)
    >>> experiment = Experiment(model, DigitsConfig(), steps=60, optimizer=optimizer)
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
    """Return `warmup_steps` if below `steps`, else a tenth of `steps`.

    >>> fitting_warmup(100, 1000), fitting_warmup(100, 60)
    (100, 6)
    """
    return warmup_steps if warmup_steps < steps else steps // 10
