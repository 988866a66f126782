"""Streams whose examples are shuffled in windows, anew in each pass."""

from __future__ import annotations

import contextlib
from typing import Any

import grain
import numpy as np

from jmp_train.data.workers import worker_index
from jmp_train.errors import DataError
from jmp_train.sources.hub_streams import PASS, SEED
from jmp_train.sources.random import generator
from jmp_train.types import Json

_WINDOW = 4  # purpose of a stream of random numbers, beside those of data.passes and data.streams


class ShuffledWindows(grain.IterDataset):
    """The examples of a stream, of which each so many in a row are shuffled.

    The order is a pure function of the seed of the run, the pass, the worker process and the window. A
    position is that of the window's first example and the number of its examples that were given, so a
    resumed run reads one window again.

    Args:
      source: an `IterDataset`.
      size: number of examples in a window; they are held in memory.
    """

    def __init__(self, source: grain.IterDataset, size: int):
        super().__init__(source)
        self._size = size

    def __iter__(self) -> _Iterator:
        return _Iterator(iter(self._parent), self._size)


class _Iterator(grain.DatasetIterator):
    def __init__(self, examples: grain.DatasetIterator, size: int):
        super().__init__(examples)
        self._size = size
        self._pass = self._seed = self._index = self._given = 0
        self._window: list[Any] = []
        self._order: np.ndarray | None = None  # None while the window is being read
        self._begin = examples.get_state()  # of the window

    def __next__(self) -> Any:
        if self._order is not None and self._given == len(self._order):
            self._next_window(self._index + 1)
        self._fill()
        if self._order is None or not len(self._order):
            raise StopIteration
        self._given += 1
        return self._window[self._order[self._given - 1]]

    def _next_window(self, index: int) -> None:
        self._begin = self._parent.get_state()
        self._index, self._given, self._window, self._order = index, 0, [], None

    def _fill(self) -> None:
        """Read the window; a DataError of an example may be followed by another call."""
        if self._order is not None:
            return
        with contextlib.suppress(StopIteration):
            while len(self._window) < self._size:
                self._window.append(next(self._parent))
        rng = generator(self._seed, self._pass, _WINDOW, worker_index(), self._index)
        self._order = rng.permutation(len(self._window))

    def get_state(self) -> Json:
        place = {"window": self._index, "given": self._given}
        return {PASS: self._pass, SEED: self._seed, **place, "examples": self._begin}

    def set_state(self, state: Json) -> None:
        self._pass, self._seed = state[PASS], state[SEED]
        self._parent.set_state(state["examples"])
        self._next_window(state["window"])
        self._given = state["given"]
        while self._given and self._order is None:
            with contextlib.suppress(DataError):  # it was counted before
                self._fill()
