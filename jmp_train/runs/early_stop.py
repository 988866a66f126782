"""Early stopping of a run: its state, which checkpoints carry, and the metric's name."""

from __future__ import annotations

import math
from typing import NamedTuple

from jmp_train.config.early_stop import EarlyStopConfig
from jmp_train.errors import UsageError, nearest


class EarlyStop(NamedTuple):
    """The best value of a metric so far, and how long ago it was."""

    best: float | None = None  # None before the first finite value
    best_step: int = 0
    since: int = 0  # evaluations since the best one

    def after(
        self, config: EarlyStopConfig, step: int, value: float, *, highest: bool
    ) -> EarlyStop:
        """Return the state after an evaluation; a non-finite value does not count as an improvement.

        >>> config = EarlyStopConfig("loss", patience=2)
        >>> state = EarlyStop()
        >>> for step, loss in [(10, 0.5), (20, 0.4), (30, 0.4), (40, float("nan"))]:
        ...     state = state.after(config, step, loss, highest=False)
        >>> state
        EarlyStop(best=0.4, best_step=20, since=2)
        """
        if math.isfinite(value):
            change = 0.0 if self.best is None else value - self.best
            if self.best is None or (change if highest else -change) > config.min_delta:
                return EarlyStop(float(value), step, 0)
        return self._replace(since=self.since + 1)

    def reason(self, config: EarlyStopConfig) -> str:
        """Return why the run ends; "" if it continues."""
        if self.since < config.patience:
            return ""
        best = "never finite" if self.best is None else f"best {self.best:.6g} at {self.best_step}"
        return f"{config.metric} has not improved in {self.since} evaluations ({best})"


def metric_of(config: EarlyStopConfig, metrics: dict[str, float]) -> float:
    """Return the value of the metric.

    Raises:
      UsageError: if it is not among the metrics, with the nearest one that is.
    """
    assert config.metric is not None
    if config.metric not in metrics:
        hint = nearest(config.metric, metrics)
        raise UsageError(f"early_stop.metric is {config.metric!r}; {hint}")
    return metrics[config.metric]
