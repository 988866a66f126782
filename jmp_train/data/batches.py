"""Batches of a source in memory, through Grain.

The order of a whole epoch is drawn at once, and a batch is gathered in one indexing operation, so
that Grain handles one record per batch. With Grain's per-example shuffle and collation, a batch of
128 digits takes about twenty times as long (benchmarks/bench_batches.py).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from jmp_train.data.bad import Bad, unmarked
from jmp_train.data.dataset import DataError, Source
from jmp_train.data.examples import Examples, regroup, stack
from jmp_train.data.order import Order, order_of
from jmp_train.data.streams import Stream, StreamIterator
from jmp_train.data.workers import close_workers, next_of_workers, read_in_workers, start_workers
from jmp_train.sources.random import generator
from jmp_train.types import Batch, Json

_TOGETHER, _MOST_TOGETHER = 2**20, 16  # bytes, and number, of batches that are made at a time
_DRAW = 1  # purpose of a stream of random numbers, beside those of data.order


class _ShuffledBatches:
    """Endless batches, reshuffled each epoch; batch i is a pure function of (seed, i)."""

    def __init__(
        self, source: Source, batch_size: int, *, seed: int, rows: np.ndarray | None = None
    ):
        self._source = source
        self._order = order_of(source, batch_size, seed=seed)
        self._rows = rows
        self._seed = seed

    def __getitem__(self, index: int) -> Batch:
        (rows,) = self._order.rows(int(index), batches=1)
        rng = generator(self._seed, index, _DRAW)
        if self._rows is None:
            return self._source.draw(rows, rng)
        if isinstance(self._source, Examples):
            return self._source.draw_part(rows, self._rows, rng)
        # Changes of a whole batch are drawn for all of it, so that they do not depend on the processes.
        return {name: x[self._rows] for name, x in self._source.draw(rows, rng).items()}


def train_batches(
    source: Source | Stream,
    batch_size: int,
    *,
    seed: int,
    workers: int = 0,
    rows: np.ndarray | None = None,
) -> Any:
    """Return endless batches: every example once per epoch, reshuffled each epoch.

    Args:
      source: the examples, such as `Arrays`. Its random numbers depend only on the seed and the
        index of the batch. A `Stream` keeps its own order.
      batch_size: number of examples in a batch; the last batch of an epoch is completed with
        examples of the next epoch.
      seed: seed of the order and of the random numbers for a batch.
      workers: number of processes that make batches, in the same order; 0 makes them in a thread.
      rows: which rows of each batch to make, ascending; None makes all. Their random numbers are those
        that they have in the whole batch.

    Returns:
      A dataset of dicts of arrays; item i is a pure function of the seed and i. See `iterate`.

    >>> from jmp_train.data import Arrays
    >>> source = Arrays({"x": np.arange(6)})
    >>> batches = train_batches(source, 3, seed=0)
    >>> sorted(np.concatenate([batches[0]["x"], batches[1]["x"]]).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    if isinstance(source, Stream):  # each process reads all of it, and takes its rows
        return source.batches(batch_size, seed=seed)
    batches = _ShuffledBatches(source, batch_size, seed=seed, rows=rows)
    return _MadeBatches(batches, workers, cheap=getattr(source, "in_memory", False))


class _MadeBatches:
    """A dataset of batches; item i is batch i.

    Args:
      batches: returns the batch with an index.
      workers: number of processes that make them; 0 makes them in a thread.
      cheap: whether a batch is made of what is in memory.
    """

    def __init__(self, batches: Any, workers: int, *, cheap: bool):
        self._batches, self._workers, self._cheap = batches, workers, cheap

    def __getitem__(self, index: int) -> Batch:
        return self._batches[index]

    def first(self) -> Batch:
        """Return the first batch, for its shapes; no worker is started for it."""
        return unmarked(self._batches[0])[0]

    def iterate(self, steps_per_call: int) -> BatchIterator:
        return BatchIterator(
            functools.partial(self._items_from, steps_per_call), steps_per_call, self._workers
        )

    def _items_from(self, steps_per_call: int, start: int) -> Iterator[Any]:
        """Iterate over the items from the batch with an index on."""
        together = 1
        if steps_per_call > 1:
            source = _Lists(self._batches, start, steps_per_call, _stack_call)
        else:
            if self._cheap and not self._workers:
                together = _how_many(self._batches[start])
            source = _Lists(self._batches, start, together)
        # One thread and a short buffer suffice, because a record is a whole batch and cheap to make.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
        items = grain.MapDataset.source(source).to_iter_dataset(options)
        if self._workers:
            iterator = read_in_workers(items, self._workers)
            start_workers(iterator)
            return iterator
        return _each(iter(items)) if together > 1 else iter(items)


class _Lists:
    """Successive batches as one record of Grain, whose own time they share."""

    def __init__(
        self,
        batches: Any,
        start: int,
        count: int,
        join: Callable[[list[Batch]], Any] | None = None,
    ):
        self._batches, self._start, self._count, self._join = batches, start, count, join

    def __len__(self) -> int:
        return 2**62 // self._count  # Grain requires a length; the batches are endless

    def __getitem__(self, index: int) -> Any:
        first = self._start + int(index) * self._count
        if self._join is not None:
            return self._join([self._batches[first + n] for n in range(self._count)])
        if self._count == 1:
            return self._batches[first]
        found: list[Any] = []
        for n in range(self._count):
            try:
                found.append(self._batches[first + n])
            except Exception as error:  # noqa: BLE001  # raised after the batches before it
                return [*found, error]
        return found


def _how_many(batch: Batch) -> int:
    """Return how many batches of a size to make at a time."""
    size = sum(x.nbytes for x in batch.values())
    return min(max(_TOGETHER // max(size, 1), 1), _MOST_TOGETHER)


def _each(lists: Any) -> Iterator[Batch]:
    """Yield the batches of lists of batches, and raise the error that ends a list."""
    try:
        for batches in lists:
            for batch in batches:
                if isinstance(batch, Exception):
                    raise batch
                yield batch
    finally:
        lists.close()


class BatchIterator:
    """Iterator whose position counts batches, whatever the number of batches in an item.

    Args:
      items_from: returns an iterator over the items from the batch with an index on.
      steps_per_call: number of batches in an item.
      workers: number of processes that make the items.
    """

    can_seek = True
    replayed = 0

    def __init__(
        self, items_from: Callable[[int], Iterator[Any]], steps_per_call: int, workers: int = 0
    ):
        self._items_from = items_from
        self._steps_per_call = steps_per_call
        self._workers = workers
        self._next = 0  # index of the next batch
        self._items: Iterator[Any] | None = None
        self.before: Json | None = None  # the state before the last item
        self.bad = Bad()  # examples that were left out, since the first batch

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Any:
        if self._items is None:
            self._items = self._items_from(self._next)
        before = self.get_state()
        item = next_of_workers(self._items) if self._workers else next(self._items)
        self.before = before
        self._next += self._steps_per_call
        if isinstance(item, dict):
            item, bad = unmarked(item)
            self.bad = self.bad.and_(bad)
        # Out of the memory that is shared with the worker, so that it is free when the worker ends.
        return {name: np.array(x) for name, x in item.items()} if self._workers else item

    def get_state(self) -> Json:
        """Return the position, a small dict for a checkpoint."""
        return {**state_at(self._next), **self.bad.state()}

    def set_state(self, state: Json) -> None:
        """Move to the position of a state from `get_state`."""
        self.close()
        self._next = state["next_batch"]
        self.bad = Bad.of(state)

    def skip(self, batches: int) -> None:
        """Move forward by a number of batches, without making them."""
        if batches:
            self.close()
            self._next += batches

    def close(self) -> None:
        """End the threads and worker processes."""
        if self._workers and self._items is not None:
            close_workers(self._items)
        else:
            getattr(self._items, "close", lambda: None)()
        self._items = None


Batches = BatchIterator | StreamIterator


def iterate(dataset: Any, steps_per_call: int = 1) -> Batches:
    """Iterate over a dataset in order, with a thread that prepares items ahead.

    Args:
      dataset: a dataset of batches from `train_batches`.
      steps_per_call: number of batches in an item; if above 1, they are stacked along a new leading
        axis. The batches and their order do not depend on it.

    Returns:
      An iterator. `get_state()` returns a small dict with the number of the next batch; `set_state`
      with that dict resumes from the same batch, with any `steps_per_call`.

    >>> from jmp_train.data import Arrays
    >>> dataset = train_batches(Arrays({"x": np.arange(6)}), 3, seed=0)
    >>> batches = iterate(dataset, steps_per_call=2)
    >>> next(batches)["x"].shape, batches.get_state()
    ((2, 3), {'next_batch': 2})
    """
    return dataset.iterate(steps_per_call)


def first_batch(dataset: Any) -> Batch:
    """Return the first batch of a dataset from `train_batches`."""
    return dataset.first()


def _stack_call(batches: Sequence[Batch]) -> Batch:
    names = [f"batch {i + 1} of {len(batches)} in a call" for i in range(len(batches))]
    return stack([{k: np.asarray(x) for k, x in batch.items()} for batch in batches], names)


def iterate_rows(order: Order, steps_per_call: int = 1) -> BatchIterator:
    """Iterate over the indices of the examples of the same batches as `train_batches`.

    Args:
      order: the order, with the size, batch size and seed of the batches.
      steps_per_call: number of batches in an item.

    Returns:
      An iterator as `iterate` returns. Its items are int32, of shape (batch,), or
      (steps_per_call, batch) if `steps_per_call` is above 1.

    >>> from jmp_train.data.order import Order
    >>> rows = iterate_rows(Order(size=6, batch_size=3, seed=0), steps_per_call=2)
    >>> next(rows).shape, rows.get_state()
    ((2, 3), {'next_batch': 2})
    """

    def items_from(start: int) -> Iterator[np.ndarray]:
        for first in itertools.count(start, steps_per_call):
            rows = order.rows(first, batches=steps_per_call).astype(np.int32)
            yield rows if steps_per_call > 1 else rows[0]

    return BatchIterator(items_from, steps_per_call)


def state_at(batch: int) -> Json:
    """Return the state of an iterator from `iterate` whose next batch has this index."""
    return {"next_batch": batch}


def saved_state(data: Json, config: Json) -> Json:
    """Return the state of an iterator as a checkpoint has it, of an earlier version too.

    Args:
      data: the state in the checkpoint; in one of an earlier version `{"next_index": calls}`, the
        number of the next call of the step.
      config: the settings that it was saved with; their `steps_per_call` was the number of batches
        in a call.

    >>> saved_state({"next_index": 3}, {"steps_per_call": 5})
    {'next_batch': 15}
    """
    if "next_index" in data:
        return state_at(data["next_index"] * config["steps_per_call"])
    return data


def eval_batches(
    held_out: Mapping[str, np.ndarray] | Examples | Stream,
    batch_size: int,
    left_out: Callable[[Bad], Any] = lambda bad: None,
) -> Iterator[dict[str, Any]]:
    """Yield every example once, in order, in batches of one shape.

    `left_out` is called with those that cannot be read and are skipped.

    The last batch is padded with copies of its first example. Each batch has a `"mask"`, bool
    (batch,), which is False for padding. If the examples include a `"mask"`, bool (examples, ...),
    which says which parts of each example count, padding is False in that mask instead.

    >>> for batch in eval_batches({"x": np.arange(3)}, 2):
    ...     print(batch["x"], batch["mask"])
    [0 1] [ True  True]
    [2 2] [ True False]
    """
    for batch, bad in _in_order(held_out, batch_size):
        if bad.count:
            left_out(bad)
        if not batch:
            continue
        rows = np.arange(batch_size)
        mask = rows < len(next(iter(batch.values())))
        rows = np.where(mask, rows, 0)
        batch = {name: array[rows] for name, array in batch.items()}
        counted = batch.get("mask", mask)
        if counted.dtype != np.bool_:
            raise DataError(f"the mask has dtype {counted.dtype}; expected bool, such as mask != 0")
        yield {**batch, "mask": counted & mask.reshape(-1, *[1] * (counted.ndim - 1))}


def _in_order(held_out: Any, batch_size: int) -> Iterator[tuple[Batch, Bad]]:
    """Yield every example once, in order, with those left out; the last batch may have fewer."""
    if isinstance(held_out, Stream):
        yield from held_out.held_out(batch_size)
    elif isinstance(held_out, Mapping):
        yield from ((batch, Bad()) for batch in regroup([held_out], batch_size))
    else:
        for start in range(0, len(held_out), batch_size):
            yield held_out.held_out(start, min(start + batch_size, len(held_out)))


def eval_batch_size(held_out: Mapping[str, np.ndarray] | Examples | Stream, largest: int) -> int:
    """Return the size of evaluation batches: at most `largest`, and the number of examples."""
    if isinstance(held_out, Stream):
        return largest
    size = len(next(iter(held_out.values()))) if isinstance(held_out, Mapping) else len(held_out)
    return min(largest, size)
