"""Early stopping: when a held-out metric counts as no longer improving."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Literal

from jmp_train.fields import check_fields

_LOWEST = {
    "loss",
    "error",
    "perplexity",
    "bits",
    "nll",
    "mse",
    "mae",
    "rmse",
    "entropy",
    "distance",
}


@dataclasses.dataclass(frozen=True)
class EarlyStopConfig:
    """Early stopping."""

    metric: str | None = None
    """Metric on the held-out data, such as loss, that must improve; None: no early stopping."""
    patience: int = 5
    """Number of evaluations in a row without an improvement that ends the run."""
    min_delta: float = 0.0
    """Change of the metric above which it counts as an improvement."""
    best: Literal["auto", "lowest", "highest"] = "auto"
    """Best value of the metric; auto: by the task, or lowest for a name like loss or error."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.patience < 1:
            raise ValueError(f"patience is {self.patience}; expected at least 1")
        if not 0 <= self.min_delta < math.inf:
            raise ValueError(f"min_delta is {self.min_delta}; expected 0 or more")

    def highest(self, metric: str, highest: bool) -> bool:
        """Return whether higher values of the metric are better.

        Args:
          metric: the metric of the experiment's task.
          highest: whether higher values of that one are better.

        >>> EarlyStopConfig("loss").highest("accuracy", True)
        False
        >>> EarlyStopConfig("f1").highest("accuracy", True)
        True
        """
        if self.best != "auto":
            return self.best == "highest"
        if self.metric in (None, metric):
            return highest
        return not _LOWEST & set(re.split(r"[^a-z]+", self.metric.lower()))
