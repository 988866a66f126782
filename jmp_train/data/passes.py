"""Passes over a Grain `IterDataset`: its batches, read in this process or in workers.

Workers are kept from one pass to the next, because a process takes seconds to start. Grain's own
`repeat` keeps them too, but repeats the random numbers of the first pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from jmp_train.data.examples import check_example, stack, takes_generator, with_generator
from jmp_train.data.workers import (
    close_workers,
    next_of_workers,
    read_in_workers,
    start_workers,
    worker_index,
)
from jmp_train.types import Batch, Function, Json

_EXAMPLE = 2  # purpose of a stream of random numbers, beside those of data.batches
_PASS = "pass_over_data"  # a key that no state of Grain has


class PassIterator:
    """Iterator over the batches of one pass, which can start another one.

    `get_state()` returns a small JSON object; an iterator of any pass resumes from it.

    Args:
      source: an `IterDataset` of examples, dicts of arrays.
      transform: as for `Examples`.
      batch_size: number of examples in a batch; fewer at the end of a pass are left out, of each
        worker.
      seed: seed of the random numbers of the transform.
      workers: number of processes that read, each its part; 0 reads in this process.
      index: index of the pass.
    """

    def __init__(
        self,
        source: grain.IterDataset,
        transform: Function | None,
        batch_size: int,
        *,
        seed: int,
        workers: int,
        index: int,
    ):
        batches = _Batches(source, transform, batch_size, seed)
        self._workers = workers
        self._items = read_in_workers(batches, workers) if workers else iter(batches)
        self._begin = self._items.get_state()
        self.start_pass(index)

    def start_pass(self, index: int) -> None:
        """Move to the beginning of a pass."""
        self.set_state(_at_pass(self._begin, index))

    def __iter__(self) -> PassIterator:
        return self

    def __next__(self) -> Batch:
        if self._workers and not self._reading:
            start_workers(self._items)
            self._reading = True
        while self._ended < max(self._workers, 1):
            batch = next_of_workers(self._items) if self._workers else next(self._items)
            if batch:
                self._ended = 0
                return batch
            self._ended += 1  # of the workers, which take turns
        raise StopIteration

    def get_state(self) -> Json:
        """Return the position."""
        return self._items.get_state()

    def set_state(self, state: Json) -> None:
        """Move to a position that `get_state` returned."""
        self._items.set_state(state)
        self._reading, self._ended = False, 0

    def close(self) -> None:
        """End the threads and worker processes."""
        if self._workers:
            close_workers(self._items)
        else:
            self._items.close()


class _Batches(grain.IterDataset):
    """Batches of one pass, and then empty batches without end."""

    def __init__(
        self, source: grain.IterDataset, transform: Function | None, batch_size: int, seed: int
    ):
        super().__init__(source)
        self._settings = transform, batch_size, seed

    def __iter__(self) -> _BatchesIterator:
        return _BatchesIterator(iter(self._parent), *self._settings)


class _BatchesIterator(grain.DatasetIterator):
    def __init__(
        self,
        examples: grain.DatasetIterator,
        transform: Function | None,
        batch_size: int,
        seed: int,
    ):
        super().__init__(examples)
        self._transform = transform and with_generator(transform)
        self._seeded = transform is not None and takes_generator(transform)
        self._batch_size, self._seed = batch_size, seed
        self._pass, self._read, self._ended = 0, 0, False

    def __next__(self) -> Batch:
        examples = []
        while len(examples) < self._batch_size and not self._ended:
            try:
                examples.append(self._transformed(next(self._parent)))
            except StopIteration:
                self._ended = True
        return {} if self._ended else stack_examples(examples)

    def _transformed(self, example: Any) -> Any:
        read, self._read = self._read, self._read + 1
        if self._transform is None:
            return example
        words = [self._seed, self._pass, _EXAMPLE, worker_index(), read]
        rng = np.random.Philox(np.random.SeedSequence(words) if self._seeded else 0)
        return self._transform(example, np.random.Generator(rng))

    def get_state(self) -> Json:
        ours = {_PASS: self._pass, "read": self._read, "ended": self._ended}
        return {**ours, "examples": self._parent.get_state()}

    def set_state(self, state: Json) -> None:
        self._pass, self._read, self._ended = state[_PASS], state["read"], state["ended"]
        self._parent.set_state(state["examples"])


def _at_pass(state: Any, index: int) -> Any:
    """Return a copy of the state at the beginning of a pass, for another pass, in each worker."""
    if isinstance(state, dict):
        copy = {key: _at_pass(value, index) for key, value in state.items()}
        return {**copy, _PASS: index} if _PASS in copy else copy
    return [_at_pass(value, index) for value in state] if isinstance(state, list) else state


def stack_examples(examples: Sequence[Any]) -> Batch:
    """Return examples of a stream as a batch.

    Raises:
      DataError: if one is not a dict of arrays, or differs from the first one.
    """
    names = [f"example {i} of a batch" for i in range(len(examples))]
    return stack([check_example(e, n) for e, n in zip(examples, names, strict=True)], names)
