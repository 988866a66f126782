"""Streams whose examples are shuffled in windows, anew in each pass."""

from __future__ import annotations

from typing import Any

import grain
import numpy as np

from jmp_train.data.bad import Bad, Skipped, check_in_row
from jmp_train.data.workers import worker_index
from jmp_train.errors import DataError
from jmp_train.sources.hub_streams import PASS, SEED
from jmp_train.sources.random import generator
from jmp_train.types import Json

_WINDOW = 5  # purpose of a stream of random numbers, beside those of data.passes and data.streams


class ShuffledWindows(grain.IterDataset):
    """The examples of a stream, of which each so many in a row are shuffled.

    The order is a pure function of the seed of the run, the pass, the worker process and the window. A
    position is that of the window's first example and the number of its examples that were given, so a
    resumed run reads one window again.

    Args:
      source: an `IterDataset`.
      size: number of examples in a window; they are held in memory.
      skips: whether examples that the source cannot read are left out, if it
        `continues_after_errors`; `Skipped` is raised once for those of a window.
    """

    def __init__(self, source: grain.IterDataset, size: int, *, skips: bool = False):
        super().__init__(source)
        self._size = size
        self._skips = skips and getattr(source, "continues_after_errors", False)

    def __iter__(self) -> _Iterator:
        return _Iterator(iter(self._parent), self._size, skips=self._skips)


class _Iterator(grain.DatasetIterator):
    def __init__(self, examples: grain.DatasetIterator, size: int, *, skips: bool):
        super().__init__(examples)
        self._size, self._skips = size, skips
        self._pass = self._seed = self._index = self._given = self._bad = 0
        self._window: list[Any] = []
        self._order: np.ndarray | None = None  # None until the window is read
        self._begin = examples.get_state()  # of the window

    def __next__(self) -> Any:
        if self._order is not None and self._given == len(self._order):
            self._next_window(self._index + 1)
        if self._order is None:
            self._order, bad = self._read()
            self._bad = bad.count
            if bad.count:
                raise Skipped(bad)
        if not len(self._order):
            raise StopIteration
        self._given += 1
        return self._window[self._order[self._given - 1]]

    def _next_window(self, index: int) -> None:
        self._begin = self._parent.get_state()
        self._index, self._given, self._bad = index, 0, 0
        self._window, self._order = [], None

    def _read(self) -> tuple[np.ndarray, Bad]:
        """Read a window; return the order of its examples, and those that are left out."""
        bad, in_row = Bad(), 0
        while len(self._window) < self._size:
            try:
                self._window.append(next(self._parent))
                in_row = 0
            except StopIteration:
                break
            except DataError as error:
                if not self._skips:
                    raise
                bad, in_row = bad.and_(Bad(1, str(error))), in_row + 1
                check_in_row(in_row, bad.why)
        rng = generator(self._seed, self._pass, _WINDOW, worker_index(), self._index + 1)
        return rng.permutation(len(self._window)), bad

    def get_state(self) -> Json:
        place = {"window": self._index, "given": self._given, "bad": self._bad}
        return {PASS: self._pass, SEED: self._seed, **place, "examples": self._begin}

    def set_state(self, state: Json) -> None:
        self._pass, self._seed = state[PASS], state[SEED]
        self._parent.set_state(state["examples"])
        self._next_window(state["window"])
        if state["given"]:
            self._order, bad = self._read()
            if bad.count != state["bad"]:
                raise DataError(
                    f"{bad.count} examples of a window cannot be read now, and {state['bad']} before; "
                    f"the first: {bad.why}"
                )
            self._given, self._bad = state["given"], state["bad"]
