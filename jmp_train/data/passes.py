"""Passes over a Grain `IterDataset`: its batches, read in this process or in workers.

Workers are kept from one pass to the next, because a process takes seconds to start. Grain's own
`repeat` keeps them too, but repeats the random numbers of the first pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from jmp_train.data.bad import Bad, OnBad, Skipped, check_in_row, unmarked
from jmp_train.data.dataset import DataError
from jmp_train.data.examples import stack, takes_generator, with_generator
from jmp_train.data.workers import (
    close_workers,
    next_of_workers,
    read_in_workers,
    start_workers,
    worker_index,
)
from jmp_train.sources.checks import check_example, check_label, check_like
from jmp_train.sources.hub_streams import PASS, SEED
from jmp_train.types import Batch, Function, Json

_EXAMPLE = 2  # purpose of a stream of random numbers, beside those of data.batches


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
      classes: as for `Examples`, if bad examples are skipped.
      on_bad: "skip" leaves out examples that cannot be read, are unlike the first one, or have a label
        out of range; batches are `Bad.marked` then. "stop" raises an error. An example that the source
        cannot read is left out only if it has `continues_after_errors`.
      first: an example that the others have to be like; None: the first good one.
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
        classes: int | None = None,
        on_bad: OnBad = "stop",
        first: Batch | None = None,
    ):
        skips = on_bad == "skip"
        reads = skips and getattr(source, "continues_after_errors", False)
        self._batches = _Batches(
            source, _Reader(transform, classes, first, skips=skips, reads=reads), batch_size, seed
        )
        self._workers, self._seed = workers, seed
        self._items = self._open()
        self._begin = self._items.get_state()
        self._used = False
        self.tail = Bad()  # what was left out after the last batch of the pass
        self.start_pass(index)

    def _open(self) -> Any:
        batches, workers = self._batches, self._workers
        return read_in_workers(batches, workers) if workers else iter(batches)

    def start_pass(self, index: int) -> None:
        """Move to the beginning of a pass."""
        if self._used and not self._workers:  # not all of Grain's iterators can be rewound
            self._items.close()
            self._items = self._open()
        self.set_state(_at_pass(self._begin, index, self._seed))

    def __iter__(self) -> PassIterator:
        return self

    def __next__(self) -> Batch:
        if self._workers and not self._reading:
            start_workers(self._items)
            self._reading = True
        while self._ended < max(self._workers, 1):
            batch = next_of_workers(self._items) if self._workers else next(self._items)
            self._used = True
            arrays, bad = unmarked(batch)
            if arrays:
                self._ended = 0
                return batch
            self.tail = self.tail.and_(bad)
            self._ended += 1  # of the workers, which take turns
        raise StopIteration

    def get_state(self) -> Json:
        """Return the position."""
        return self._items.get_state()

    def set_state(self, state: Json) -> None:
        """Move to a position that `get_state` returned."""
        self._items.set_state(state)
        self._reading, self._ended, self.tail = False, 0, Bad()

    def close(self) -> None:
        """End the threads and worker processes."""
        if self._workers:
            close_workers(self._items)
        else:
            self._items.close()


class _Batches(grain.IterDataset):
    """Batches of one pass, and then empty batches without end."""

    def __init__(self, source: grain.IterDataset, reader: _Reader, batch_size: int, seed: int):
        super().__init__(source)
        self._settings = reader, batch_size, seed

    def __iter__(self) -> _BatchesIterator:
        return _BatchesIterator(iter(self._parent), *self._settings)


class _Reader:
    """Reads examples of an iterator, and skips bad ones if it is asked to."""

    def __init__(
        self,
        transform: Function | None,
        classes: int | None,
        first: Batch | None,
        *,
        skips: bool,
        reads: bool,
    ):
        self._transform, self._classes, self._first = transform, classes, first
        self.skips, self._reads = skips, reads
        self.seeded = transform is not None and takes_generator(transform)

    def read(self, examples: Iterator[Any], generator: Callable[[], np.random.Generator]) -> Any:
        """Return the next example, transformed with the random numbers of its position.

        Raises:
          Skipped: for one that is left out.
        """
        if not self.skips:
            return self._transformed(next(examples), generator)
        try:
            example = next(examples)
        except DataError as error:
            if self._reads:
                raise Skipped(Bad(1, str(error))) from error
            raise
        try:
            return self._checked(example, generator)
        except DataError as error:
            raise Skipped(Bad(1, str(error))) from error

    def _checked(self, example: Any, generator: Callable[[], np.random.Generator]) -> Batch:
        name = "an example of the stream"
        try:
            example = check_example(self._transformed(example, generator), name)
        except DataError:
            raise
        except Exception as error:  # of the user's transform
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(f"{name} cannot be transformed: {what}") from error
        check_label(example, self._classes, name)
        self._first = self._first or example
        check_like(example, name, self._first, "the first example")
        return example

    def _transformed(self, example: Any, generator: Callable[[], np.random.Generator]) -> Any:
        if self._transform is None:
            return example
        return with_generator(self._transform)(example, generator())


class _BatchesIterator(grain.DatasetIterator):
    def __init__(
        self, examples: grain.DatasetIterator, reader: _Reader, batch_size: int, seed: int
    ):
        super().__init__(examples)
        self._reader, self._batch_size, self._seed = reader, batch_size, seed
        self._pass, self._read, self._ended = 0, 0, False

    def __next__(self) -> Batch:
        examples, bad, in_row = [], Bad(), 0
        while len(examples) < self._batch_size and not self._ended:
            try:
                examples.append(self._reader.read(self._parent, self._generator))
                in_row = 0
            except StopIteration:
                self._ended = True
            except Skipped as skipped:
                bad, in_row = bad.and_(skipped.bad), in_row + 1
                check_in_row(in_row, bad.why)
        if self._ended:
            return bad.marked({}) if bad.count else {}
        batch = stack_examples(examples)
        return bad.marked(batch) if self._reader.skips else batch

    def _generator(self) -> np.random.Generator:
        read, self._read = self._read, self._read + 1  # examples that were transformed
        words = [self._seed, self._pass, _EXAMPLE, worker_index(), read]
        seeds = np.random.SeedSequence(words) if self._reader.seeded else 0
        return np.random.Generator(np.random.Philox(seeds))

    def get_state(self) -> Json:
        ours = {PASS: self._pass, "read": self._read, "ended": self._ended}
        return {**ours, "examples": self._parent.get_state()}

    def set_state(self, state: Json) -> None:
        self._pass, self._read, self._ended = state[PASS], state["read"], state["ended"]
        self._parent.set_state(state["examples"])


def _at_pass(state: Any, index: int, seed: int) -> Any:
    """Return a copy of the state at the beginning of a pass, for another pass, in each worker.

    An iterator of a source has the number of the pass in its state, and the seed of the run, if it has
    the keys `PASS` and `SEED` there.
    """
    if isinstance(state, dict):
        copy = {key: _at_pass(value, index, seed) for key, value in state.items()}
        return {**copy, **{k: v for k, v in ((PASS, index), (SEED, seed)) if k in copy}}
    return [_at_pass(value, index, seed) for value in state] if isinstance(state, list) else state


def stack_examples(examples: Sequence[Any]) -> Batch:
    """Return examples of a stream as a batch.

    Raises:
      DataError: if one is not a dict of arrays, or differs from the first one.
    """
    names = [f"example {i} of a batch" for i in range(len(examples))]
    return stack([check_example(e, n) for e, n in zip(examples, names, strict=True)], names)
