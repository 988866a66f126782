"""Means of the training metrics over the steps since the last record."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jmp_train.records.metrics import strict_json
from jmp_train.types import Json


class Window:
    """Sums of metrics over the steps taken since the last record, in float64.

    Values are added one after another, so that the sums do not depend on how the steps are divided
    into calls, or on a resume.

    Args:
      saved: the state of a window in a checkpoint, `{"taken": int, "sums": {name: float}}`.

    >>> window = Window()
    >>> window.add({"loss": np.array([1.0, 2.0, np.inf])}, taken=np.array([True, True, False]))
    >>> window.means(), window.taken
    ({'loss': 1.5}, 2)
    """

    def __init__(self, saved: Json | None = None):
        saved = saved or {"taken": 0, "sums": {}}
        self.taken: int = saved["taken"]
        self._sums = {name: float(x) for name, x in saved["sums"].items()}

    def add(self, metrics: Mapping[str, np.ndarray], taken: np.ndarray | None) -> None:
        """Add the metrics of some steps.

        Args:
          metrics: by name, one value per step; shape=(steps,).
          taken: whether each step was taken; shape=(steps,), bool. The metrics of a skipped step do
            not count, because they are often not finite. None: every step was taken.
        """
        steps = len(next(iter(metrics.values())))
        self.taken += steps if taken is None else int(taken.sum())
        for name, values in metrics.items():
            counted = values if taken is None else values[taken]
            terms = np.concatenate([[self._sums.get(name, 0.0)], counted.astype(np.float64)])
            with np.errstate(invalid="ignore", over="ignore"):  # of a run that diverges
                self._sums[name] = float(np.add.accumulate(terms)[-1])

    def means(self) -> dict[str, float]:
        """Return the means over the steps taken; NaN if none was."""
        return {name: x / self.taken if self.taken else np.nan for name, x in self._sums.items()}

    def state(self) -> Json:
        """Return the state for a checkpoint, as strict JSON."""
        return strict_json({"taken": self.taken, "sums": self._sums})

    def clear(self) -> None:
        """Start a new window."""
        self.taken, self._sums = 0, {}
