"""What a data configuration loads: a source to train on, held-out arrays, and their spec."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from jmp_train.spec import DataSpec

Batch = dict[str, np.ndarray]


class Source(Protocol):
    """Examples to train on."""

    def __len__(self) -> int:
        """Return the number of examples in an epoch."""
        ...

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        """Return the examples of these numbers as a batch; `rng` is for what is random in them."""
        ...


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Examples in arrays by name, whose first axis counts them."""

    arrays: Mapping[str, np.ndarray]
    augment: Callable[[Batch, np.random.Generator], Batch] | None = None
    """Changes each batch at random; None leaves it alone."""

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        batch = {name: array[rows] for name, array in self.arrays.items()}
        return batch if self.augment is None else self.augment(batch, rng)


class Dataset(NamedTuple):
    """A source to train on and arrays to evaluate on."""

    train: Source
    eval: dict[str, np.ndarray]
    """Arrays by name, the first axis counting examples; `"mask"`, bool, says which values of the
    metrics count."""
    spec: DataSpec
    facts: Callable[[], dict[str, Any]] = dict
    """Returns what summary.json says of the data."""
