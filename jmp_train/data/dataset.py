"""Data sets: a source of training examples, held-out arrays, and their spec."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from jmp_train.errors import DataError
from jmp_train.spec import DataSpec
from jmp_train.types import Batch

__all__ = ["Arrays", "DataError", "Dataset", "Source"]


class Source(Protocol):
    """Protocol of training examples."""

    def __len__(self) -> int:
        """Return the number of examples in an epoch."""
        ...

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        """Return the examples with these indices as a batch; `rng` is for random augmentation."""
        ...


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A source of examples in arrays by name.

    >>> source = Arrays({"x": np.arange(6), "y": np.arange(6) * 10})
    >>> source.draw(np.array([4, 1]), np.random.default_rng(0))
    {'x': array([4, 1]), 'y': array([40, 10])}
    """

    arrays: Mapping[str, np.ndarray]
    """Arrays by name, whose leading axis counts examples."""
    augment: Callable[[Batch, np.random.Generator], Batch] | None = None
    """`augment(batch, rng)` returns a batch with random changes; None makes no changes."""
    in_memory: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        batch = {name: array[rows] for name, array in self.arrays.items()}
        return batch if self.augment is None else self.augment(batch, rng)


class Dataset(NamedTuple):
    """Training examples, held-out examples, and their spec."""

    train: Source | Any
    """A source, or a `Stream`."""
    eval: dict[str, np.ndarray] | Any
    """Held-out arrays by name, whose leading axis counts examples; a `"mask"`, bool, says which
    values of the metrics count. Or a source or a `Stream`, of which every example is used once."""
    spec: DataSpec
    facts: Callable[[], dict[str, Any]] = dict
    """Returns facts about the data for summary.json."""
    workers: int = 0
    """Number of processes that read the training examples; 0 reads them in a thread."""
    files: Mapping[str, str] = MappingProxyType({})
    """Texts by the name of a file in the directory of a run, such as tokenizer.json. `load(run_dir=)`
    finds them there when a run is resumed or evaluated."""
    notes: tuple[str, ...] = ()
    """Lines about what was loaded, which a run shows."""
