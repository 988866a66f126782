"""The optimizers that an experiment chooses by name, with their schedule and clipping."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import optax

from jmp_train.optim.fp32_state import fp32_state


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, its schedule and its clipping."""

    name: Literal["adamw", "adam", "sgd", "lion", "muon"] = "adamw"
    """Optimizer; its state is float32 under every policy."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak to zero (constant: it does not) by the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from zero to its peak."""
    weight_decay: float = 1e-4
    """Decoupled weight decay (adamw, lion, muon)."""
    b1: float = 0.9
    """Decay of the first moment (adamw, adam, lion)."""
    b2: float = 0.999
    """Decay of the second moment (adamw, adam), or of the momentum (lion)."""
    eps: float = 1e-8
    """Added to the root of the second moment (adamw, adam)."""
    momentum: float = 0.9
    """Momentum (sgd), Nesterov's."""
    max_grad_norm: float | None = 1.0
    """Global norm that unscaled gradients are clipped to; None does not clip."""

    def __post_init__(self) -> None:
        for field in ("learning_rate", "eps"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field} is {getattr(self, field)}; expected a number above 0")
        for field in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected 0 <= {field} < 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}; expected 0 or more")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; expected 0 or more")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm is {self.max_grad_norm}; expected a number above 0, or None"
            )


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the update's number, from 0.

    Args:
      config: its `learning_rate`, `schedule` and `warmup_steps`.
      steps: updates in the whole run.

    Raises:
      ValueError: if the warm-up is longer than the run.

    >>> schedule = make_schedule(OptimizerConfig(learning_rate=0.1, warmup_steps=10), steps=110)
    >>> [round(float(schedule(n)), 3) for n in (0, 5, 10, 60, 110)]
    [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    if config.warmup_steps >= steps:
        raise ValueError(
            f"optimizer.warmup_steps is {config.warmup_steps}; expected fewer than steps ({steps})"
        )
    peak, rest = config.learning_rate, steps - config.warmup_steps
    schedule = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if config.warmup_steps == 0:
        return schedule
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, schedule], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a config: clip by global norm, then the named update, state in float32.

    Args:
      config: which one.
      steps: updates in the whole run, for the schedule.

    Raises:
      ValueError: if the warm-up is longer than the run.
    """
    rate = make_schedule(config, steps)
    c = config
    optimizer = {
        "adamw": lambda: optax.adamw(rate, c.b1, c.b2, c.eps, weight_decay=c.weight_decay),
        "adam": lambda: optax.adam(rate, c.b1, c.b2, c.eps),
        "sgd": lambda: optax.sgd(rate, momentum=c.momentum or None, nesterov=c.momentum > 0),
        "lion": lambda: optax.lion(rate, c.b1, c.b2, weight_decay=c.weight_decay),
        "muon": lambda: optax.contrib.muon(
            rate, weight_decay=c.weight_decay, adam_weight_decay=c.weight_decay
        ),
    }[config.name]()
    if config.max_grad_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optimizer)
    return fp32_state(optimizer)
