"""Learning-rate schedules that an experiment chooses by Optax's names."""

from __future__ import annotations

import optax

from jmp_train.optim.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates made so far.

    A linear warm-up comes first, then the schedule over the rest of the run. `cosine_onecycle` has
    its own rise instead: over the warm-up, or over 0.3 of the run without one.

    Args:
      config: its `learning_rate`, `schedule`, `warmup_steps` and the schedules' settings are used.
      steps: number of updates in the whole run.

    Raises:
      ValueError: if the warm-up is not shorter than the run; `config.warmup.fit_warmup` shortens
      it.

    Source: Optax's functions of the same names. wsd (warm-up, stable, decay): Hu et al. 2024,
    "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies".

    >>> schedule = make_schedule(OptimizerConfig(learning_rate=0.1, warmup_steps=10), steps=110)
    >>> [round(float(schedule(n)), 3) for n in (0, 5, 10, 60, 110)]
    [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    warmup = config.warmup_steps
    if warmup >= steps:
        raise ValueError(f"optimizer.warmup_steps is {warmup}; expected fewer than steps ({steps})")
    if config.schedule == "cosine_onecycle":
        start = warmup / steps if warmup else 0.3
        return optax.cosine_onecycle_schedule(steps, config.learning_rate, start)
    schedule = _after_warmup(config, steps)
    if warmup == 0:
        return schedule
    rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
    return optax.join_schedules([rise, schedule], [warmup])


def _after_warmup(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the schedule as a function of the updates since the warm-up."""
    c, peak, rest = config, config.learning_rate, steps - config.warmup_steps
    end = peak * c.end_factor
    return {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, c.end_factor),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "constant": lambda: optax.constant_schedule(peak),
        "exponential": lambda: optax.exponential_decay(peak, rest, c.decay_rate),
        "polynomial": lambda: optax.polynomial_schedule(peak, end, c.power, rest),
        "piecewise_constant": lambda: optax.piecewise_constant_schedule(peak, _drops(c, steps)),
        "wsd": lambda: _stable_then_decay(peak, end, rest, round(steps * c.decay_fraction)),
    }[c.schedule]()


def _drops(config: OptimizerConfig, steps: int) -> dict[int, float]:
    """Return the factor at each boundary, in updates since the warm-up."""
    drops: dict[int, float] = {}
    for fraction in config.boundaries:
        at = round(fraction * steps) - config.warmup_steps
        drops[at] = drops.get(at, 1.0) * config.decay_rate  # a short run rounds two to one step
    return drops


def _stable_then_decay(peak: float, end: float, rest: int, decay: int) -> optax.Schedule:
    decay = min(max(decay, 1), rest)
    return optax.linear_schedule(peak, end, decay, transition_begin=rest - decay)
