"""Streams of Hugging Face `datasets`, whose position can be saved and whose order has a seed.

The shuffle buffer of the library is lost when a stream resumes. Here, groups of examples are shuffled
instead: the position is that of the library before a group, and a number of examples in the group.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from jmp_train.errors import DataError
from jmp_train.sources.features import Column, ImageReader, read_table
from jmp_train.sources.random import generator
from jmp_train.types import Batch, Json

_ORDER = 4  # purpose of a stream of random numbers, beside those of the modules around
_ROWS = 64  # that are read at once

PASS, SEED = "pass_over_data", "seed_of_run"  # keys that no state of Grain has


class ShardStream(grain.IterDataset):
    """A stream of the rows of a `datasets.IterableDataset`.

    Each pass over it shuffles the shards, which are files, and groups of rows. The order is a pure
    function of the seed of the run and the number of the pass. Each worker process reads its shards.

    Args:
      data: the data set, in the format of PyArrow tables and with undecoded images.
      columns: what to read.
      reader: reads the images.
      together: number of rows that are shuffled together; None: rows come in order.
    """

    continues_after_errors = True  # after a row that cannot be read, the next one is

    def __init__(self, data: Any, columns: list[Column], reader: ImageReader, together: int | None):
        super().__init__()
        self.data, self.columns, self.reader, self.together = data, columns, reader, together
        self.part = slice(None)

    @property
    def classes(self) -> int | None:
        """The number of classes of the label."""
        return next((c.kind.classes for c in self.columns if c.name == "label"), None)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Read a part of the shards, that of a worker process."""
        self.part = sl

    def __iter__(self) -> _ShardIterator:
        return _ShardIterator(self)


class _ShardIterator(grain.DatasetIterator):
    def __init__(self, stream: ShardStream):
        super().__init__()
        self._stream = stream
        self._state: Json = {PASS: 0, SEED: 0, "shard": 0, "at": None, "group": 0, "taken": 0}
        self._group: _Group | None = None  # of the state; None: to be read
        self._rows: _Tables | None = None

    def __next__(self) -> Batch:
        if self._group is None:
            self._group = self._read_group()
        if self._state["taken"] == len(self._group):
            if not len(self._group):
                raise StopIteration
            self._state = {**self._state, **self._group.after, "taken": 0}
            self._state["group"] += 1
            self._group = None
            return next(self)
        taken = self._state["taken"]
        self._state = {**self._state, "taken": taken + 1}  # before a row that cannot be read
        return self._group.row(taken)

    def get_state(self) -> Json:
        return dict(self._state)

    def set_state(self, state: Json) -> None:
        self._state, self._group, self._rows = dict(state), None, None

    def _read_group(self) -> _Group:
        """Read the rows of the group at the position."""
        stream, state = self._stream, self._state
        seed, index = state[SEED], state[PASS]
        if self._rows is None:
            count = stream.data.num_shards
            shards = np.arange(count)
            if stream.together is not None:
                shards = generator(seed, index, _ORDER).permutation(count)
            shards = shards[stream.part].tolist()
            size = min(stream.together or _ROWS, _ROWS)
            self._rows = _Tables(stream.data, shards, state["shard"], state["at"], size)
        try:
            rows = self._rows.read(stream.together or _ROWS)
        except DataError:
            self._rows = None  # to be read again from the position
            raise
        order = np.arange(sum(len(table) for table in rows))
        if stream.together is not None:
            first = stream.part.start or 0  # differs between workers
            generator(seed, index, _ORDER, 1 + first, state["group"]).shuffle(order)
        return _Group(rows, order, stream, self._rows.position())


class _Tables:
    """The tables of some shards, one after another.

    Args:
      data: the data set.
      shards: numbers of its shards.
      first: place in `shards` of the first one to read.
      at: position in that one, of `state_dict`; None: its beginning.
      size: number of rows in a table.
    """

    def __init__(self, data: Any, shards: list[int], first: int, at: Json | None, size: int):
        self._data, self._shards, self._size = data, shards, size
        self._next, self._at = first, at
        self._open: tuple[Any, Iterator[Any]] | None = None  # a shard, and the tables in it

    def read(self, rows: int) -> list[Any]:
        """Return tables of at least a number of rows in all, of fewer at the end.

        Raises:
          DataError: for a shard that cannot be read.
        """
        found, count = [], 0
        while count < rows and self._next < len(self._shards):
            number = self._shards[self._next]
            try:
                table = self._table(number)
            except Exception as error:  # the library raises many types
                what = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise DataError(f"shard {number} of the data cannot be read: {what}") from error
            if table is None:
                self._next, self._at, self._open = self._next + 1, None, None
                continue
            found.append(table)
            count += len(table)
        return found

    def position(self) -> Json:
        """Return where the next table begins."""
        return {"shard": self._next, "at": self._at}

    def _table(self, number: int) -> Any:
        """Return the next table of a shard; None at its end."""
        if self._open is None:
            shard = self._data.shard(self._data.num_shards, number)
            if self._at is not None:
                shard.load_state_dict(self._at)
            self._open = shard, shard.iter(batch_size=self._size)
        shard, tables = self._open
        table = next(tables, None)
        self._at = shard.state_dict()
        return table


class _Group:
    """Rows that are shuffled together.

    Args:
      tables: of PyArrow.
      order: place among the rows of the tables of each row.
      stream: says what to read.
      after: where the next group begins.
    """

    def __init__(self, tables: list[Any], order: np.ndarray, stream: ShardStream, after: Json):
        self._tables, self._order, self._stream, self.after = tables, order, stream, after
        self._starts = [0, *itertools.accumulate(len(table) for table in tables)]

    def __len__(self) -> int:
        return len(self._order)

    def row(self, place: int) -> Batch:
        """Return a row.

        Raises:
          DataError: for one that cannot be read.
        """
        row = int(self._order[place])
        at = int(np.searchsorted(self._starts, row, side="right")) - 1
        table = self._tables[at].slice(row - self._starts[at], 1)
        found = read_table(table, self._stream.columns, self._stream.reader)
        return {name: array[0] for name, array in found.items()}
