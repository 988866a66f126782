"""The trackers that a run chooses by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Literal

from jmp_train.errors import UsageError
from jmp_train.records.trackers.csv import Csv
from jmp_train.records.trackers.mlflow import Mlflow
from jmp_train.records.trackers.tensorboard import TensorBoard
from jmp_train.records.trackers.tracker import Tracker
from jmp_train.records.trackers.wandb import Wandb

TrackerName = Literal["tensorboard", "csv", "wandb", "mlflow"]
"""A tracker that `--trackers` takes."""

_TRACKERS = {"tensorboard": TensorBoard, "csv": Csv, "wandb": Wandb, "mlflow": Mlflow}
_EXTRAS = ("wandb", "mlflow")  # modules that the extras of the same names install


def make_trackers(
    names: Iterable[TrackerName], own: Iterable[Tracker] = ()
) -> list[tuple[str, Tracker]]:
    """Return pairs of a name and a tracker.

    Args:
      names: bundled trackers; one that is named twice counts once.
      own: others, which go by the names of their classes.

    Raises:
      UsageError: if the package of a tracker is not installed.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        if name in _EXTRAS and not _installed(name):
            raise UsageError(
                f"tracker {name!r} needs the package {name}, which is not installed; expected "
                f"pip install 'jmp-train[{name}]'"
            )
    bundled = [(name, _TRACKERS[name]()) for name in names]
    return [*bundled, *((type(tracker).__name__, tracker) for tracker in own)]


def _installed(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # a folder of that name has no origin
