"""Streams: data that are read in order, from a Grain IterDataset or a function that returns batches."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from jmp_train.data.bad import Bad, OnBad, unmarked
from jmp_train.data.dataset import DataError
from jmp_train.data.examples import checked_batch_transform, regroup, stack, takes_generator
from jmp_train.data.passes import PassIterator, stack_examples
from jmp_train.sources.checks import check_example, check_labels, check_like
from jmp_train.types import Batch, Function, Json

_BATCH = 3  # purpose of a stream of random numbers, beside those of data.batches and data.passes


class Stream:
    """Batches in the order of a Grain `IterDataset`, or of the iterators of a function.

    The stream starts again at its end, so it is endless. Examples at its end that do not fill a batch
    are left out of that pass, of each worker; so is a shorter last batch of a function.

    Args:
      source: an `IterDataset` of examples, dicts of arrays; or a function that returns an iterator of
        batches, dicts of arrays of equal leading axes. A function may take `batch_size`, `seed` and
        `epoch`, and gets those that it has arguments for.
      transform: as for `Examples`; for an `IterDataset` alone.
      batch_transform: as for `Examples`.
      workers: number of processes that read an `IterDataset`; 0 reads in a thread.
      classes: as for `Examples`.
      on_bad: as for `PassIterator`; "skip" is for an `IterDataset` alone.

    Raises:
      DataError: for "skip" with a function of batches.
    """

    def __init__(
        self,
        source: Any,
        transform: Function | None = None,
        batch_transform: Function | None = None,
        workers: int = 0,
        *,
        classes: int | None = None,
        on_bad: OnBad = "stop",
    ):
        if on_bad == "skip" and not isinstance(source, grain.IterDataset):
            raise DataError(
                "on_bad is skip, and the data are batches that a function makes; expected on_bad=stop, "
                "or data of single examples"
            )
        self._source: Any = source
        self._on_bad: OnBad = on_bad
        self._example: Batch | None = None  # the first good one, if bad ones are skipped
        self._transform = transform
        self._augment = batch_transform and checked_batch_transform(batch_transform)
        self._random = batch_transform is not None and takes_generator(batch_transform)
        self._classes = classes
        self.workers = workers

    def open(
        self, batch_size: int, *, seed: int, index: int, workers: int | None = None
    ) -> Iterator[Batch]:
        """Return an iterator over the pass with an index; `workers` None is that of the stream."""
        if not isinstance(self._source, grain.IterDataset):
            return self._call(batch_size=batch_size, seed=seed, epoch=index)
        workers = self.workers if workers is None else workers
        return self._pass(self._transform, batch_size, seed=seed, workers=workers, index=index)

    def _pass(self, transform: Function | None, batch_size: int, **options: int) -> PassIterator:
        given: Any = {"classes": self._classes, "on_bad": self._on_bad, "first": self._example}
        return PassIterator(self._source, transform, batch_size, **options, **given)

    def batches(self, batch_size: int, *, seed: int) -> StreamBatches:
        """Return the endless batches of a run."""
        return StreamBatches(self, batch_size, seed)

    def augment(self, batch: Batch, name: str, rng: np.random.Generator) -> Batch:
        """Return a batch with the changes of the batch's transform.

        Raises:
          DataError: if it cannot be transformed, or has a label out of range.
        """
        self._check_labels(batch, name)
        return batch if self._augment is None else self._augment(batch, rng)

    def held_out(self, batch_size: int) -> Iterator[tuple[Batch, Bad]]:
        """Yield every example of one pass once, without random transforms, with those left out; the
        last batch may have fewer."""
        left_out: list[Bad] = []
        unused = np.random.Generator(np.random.Philox(0))
        for i, batch in enumerate(
            regroup(self._held_out_batches(batch_size, left_out), batch_size)
        ):
            self._check_labels(batch, f"held-out batch {i}")
            bad, left_out[:] = functools.reduce(Bad.and_, left_out, Bad()), []
            skipped = self._augment is None or self._random
            yield (batch if skipped else self._augment(batch, unused)), bad  # pyright: ignore
        if left_out:
            yield {}, functools.reduce(Bad.and_, left_out)

    def _held_out_batches(self, batch_size: int, left_out: list[Bad]) -> Iterator[Batch]:
        """Yield the batches of one pass, and append what was left out of each."""
        if not isinstance(self._source, grain.IterDataset):
            passed = self._call(batch_size=batch_size, seed=0, epoch=0)
            yield from (check_batch(batch, f"batch {i}") for i, batch in enumerate(passed))
            return
        transform = self._transform
        transform = None if transform is None or takes_generator(transform) else transform
        if self._on_bad == "stop":
            source = self._source if transform is None else self._source.map(transform)
            batches: Any = source.batch(batch_size, drop_remainder=False, batch_fn=stack_examples)
            yield from batches
            return
        with contextlib.closing(self._pass(transform, 1, seed=0, workers=0, index=0)) as single:
            for batch, bad in map(unmarked, single):
                left_out += [bad] if bad.count else []
                yield batch
            left_out += [single.tail] if single.tail.count else []

    def _check_labels(self, batch: Batch, name: str) -> None:
        check_labels(batch, self._classes, [name] * _size(batch))

    def first(self, batch_size: int = 1) -> Batch:
        """Return the first batch, for its spec.

        Raises:
          DataError: if there is none.
        """
        passed = self.open(batch_size, seed=0, index=0, workers=0)
        batch = next(passed, None)
        getattr(passed, "close", lambda: None)()
        if batch is None:
            raise DataError("the data are empty; expected at least one example")
        batch = check_batch(unmarked(batch)[0], "batch 0")
        if self._on_bad == "skip":
            self._example = {name: array[0] for name, array in batch.items()}
        return self.augment(batch, "batch 0", np.random.default_rng(0))

    def _call(self, **values: int) -> Iterator[Batch]:
        taken = _arguments(self._source)
        made = self._source(**{name: v for name, v in values.items() if name in taken})
        if not hasattr(made, "__iter__"):
            raise DataError(
                f"{_name(self._source)} returned a {type(made).__name__}; expected an iterator of "
                "batches, dicts of arrays"
            )
        return iter(made)


class StreamBatches:
    """The endless batches of a stream for a run."""

    def __init__(self, stream: Stream, batch_size: int, seed: int, workers: int | None = None):
        self._stream, self.size, self._seed = stream, batch_size, seed
        self.workers = stream.workers if workers is None else workers

    def iterate(self, steps_per_call: int = 1) -> StreamIterator:
        """Return an iterator over items of so many batches."""
        return StreamIterator(self, steps_per_call)

    def open(self, epoch: int) -> Iterator[Batch]:
        """Return an iterator over one pass."""
        return self._stream.open(self.size, seed=self._seed, index=epoch, workers=self.workers)

    def first(self) -> Batch:
        """Return the first batch, for its shapes; no worker is started for it."""
        alone = StreamBatches(self._stream, self.size, self._seed, workers=0)
        with contextlib.closing(alone.iterate()) as batches:
            return next(batches)

    def finish(self, batch: Batch, index: int) -> Batch:
        """Return a batch transformed."""
        seeds = np.random.SeedSequence([self._seed, index, _BATCH])
        rng = np.random.Generator(np.random.Philox(seeds))
        return self._stream.augment(batch, f"batch {index}", rng)


class StreamIterator:
    """Iterator over the batches of a stream, whose position counts batches.

    `get_state()` returns a small JSON object: the position, the pass and the state of the stream's own
    iterator if it has `get_state` and `set_state`. Without them, the batches before the position are
    read again when it resumes.
    """

    before = None  # the state before the last item, which is not kept

    def __init__(self, batches: StreamBatches, steps_per_call: int):
        self._batches = batches
        self._steps_per_call = steps_per_call
        self._next, self._epoch = 0, 0
        self._pass: Iterator[Batch] | None = None
        self._read = 0  # batches of this pass
        self.replayed = 0  # batches that were read again to resume
        self._first: tuple[Batch, str] | None = None  # the first batch, and its name
        self._known: Json | None = None  # the last state that was returned or given
        self._failed: Json | None = None  # the state before an item that could not be read
        self.bad = Bad()  # examples that were left out, since the first batch

    def __iter__(self) -> StreamIterator:
        return self

    def __next__(self) -> Batch:
        if self._known is None:
            self.get_state()
        before = self._position()
        try:
            names = [f"batch {self._next + i}" for i in range(self._steps_per_call)]
            items = [self._one() for _ in names]
            if self._first is None:
                self._first = items[0], names[0]
            for item, name in zip(items, names, strict=True):
                check_like(item, name, *self._first)
        except DataError:
            self._failed = {**before, "from": self._known} if self.can_seek else before
            raise
        if self._steps_per_call == 1:
            return items[0]
        first = self._next - len(items)
        return stack(items, [f"batch {first + i}" for i in range(len(items))])

    @property
    def can_seek(self) -> bool:
        """Whether the stream's iterator resumes at a position without reading what is before."""
        passed = self._opened()
        return hasattr(passed, "get_state") and hasattr(passed, "set_state")

    def get_state(self) -> Json:
        """Return the position; that before an item that could not be read, if there was one."""
        if self._failed is not None:
            return self._failed
        state = self._position()
        if self.can_seek:
            inner: Any = self._opened().get_state()  # pyright: ignore
            state["stream"] = json.loads(inner) if isinstance(inner, bytes) else inner
            try:
                json.dumps(state)
            except TypeError as error:
                raise DataError(f"the state of the data is not JSON: {error}") from error
        self._known = state
        return state

    def _position(self) -> Json:
        position = {"next_batch": self._next, "epoch": self._epoch, "read": self._read}
        return {**position, **self.bad.state()}

    def set_state(self, state: Json) -> None:
        """Resume from a position that `get_state` or `state_at` returned."""
        self.close()
        self._next, self._epoch, self._read = 0, 0, 0
        self._known, self._failed, self.bad = state, None, Bad()
        if self.can_seek and "from" in state:
            self.set_state(state["from"])
            self.skip(state["next_batch"] - self._next)
            return
        if self.can_seek and "stream" in state:
            self._next, self._epoch = state["next_batch"], state["epoch"]
            self._read, self.bad = state["read"], Bad.of(state)
            self.close()
            self._opened().set_state(state["stream"])  # pyright: ignore
            return
        self.replayed = state["next_batch"]
        self.skip(state["next_batch"])

    def skip(self, batches: int) -> None:
        """Move forward by a number of batches; they are read."""
        for _ in range(batches):
            self._raw()

    def _one(self) -> Batch:
        index = self._next
        return self._batches.finish(self._raw(), index)

    def _raw(self) -> Batch:
        """Return the next whole batch, of the next pass if this one has no more."""
        while True:
            batch = self._next_of_pass()
            size = 0 if batch is None else _size(batch)
            if batch is not None and size == self._batches.size:
                self._next, self._read = self._next + 1, self._read + 1
                # Out of the memory that worker processes share, as in `BatchIterator`.
                own = self._batches.workers
                return {name: np.array(x) for name, x in batch.items()} if own else batch
            if size > self._batches.size or (size and self._next_of_pass() is not None):
                raise DataError(
                    f"batch {self._next} has {size} examples; expected {self._batches.size}, the "
                    "batch_size, or fewer in the last batch of a pass, which is left out"
                )
            if not self._read:
                raise DataError(
                    f"pass {self._epoch} over the data has no whole batch; expected a smaller "
                    "--batch-size, or more examples"
                )
            self._start_pass(self._epoch + 1)

    def _next_of_pass(self) -> Batch | None:
        """Return the next batch of the pass, checked; None at its end."""
        try:
            batch = next(self._opened())
        except StopIteration:
            if isinstance(self._pass, PassIterator):
                self.bad = self.bad.and_(self._pass.tail)
                self._pass.tail = Bad()
            return None
        except (DataError, KeyboardInterrupt):
            raise
        except Exception as error:  # of the user's code
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(f"batch {self._next} cannot be read: {what}") from error
        if isinstance(batch, dict):
            batch, bad = unmarked(batch)
            self.bad = self.bad.and_(bad)
        return check_batch(batch, f"batch {self._next}")

    def _start_pass(self, index: int) -> None:
        self._epoch, self._read = index, 0
        if isinstance(self._pass, PassIterator):
            self._pass.start_pass(index)  # keeps its workers
        else:
            self.close()

    def _opened(self) -> Iterator[Batch]:
        if self._pass is None:
            self._pass = self._batches.open(self._epoch)
        return self._pass

    def close(self) -> None:
        """End the threads and worker processes."""
        close: Callable[[], None] = getattr(self._pass, "close", lambda: None)
        close()
        self._pass = None


def check_batch(batch: Any, name: str) -> Batch:
    """Return a batch with its values as arrays.

    Raises:
      DataError: if it is not a dict of arrays whose leading axes are equal.
    """
    batch = check_example(
        batch, name, what="a dict of arrays by name, whose leading axis counts examples"
    )
    check_leading_axes(batch, name)
    return batch


def check_leading_axes(arrays: Batch, name: str) -> None:
    """Raise DataError for arrays whose leading axes differ."""
    for key, array in arrays.items():
        if array.ndim == 0:
            raise DataError(f"{name}: {key!r} has no axes; expected a leading axis of examples")
    sizes = {key: len(array) for key, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{key!r} has {size}" for key, size in sizes.items())
        raise DataError(f"{name}: {shown} examples; expected the same number in every array")


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _arguments(function: Function) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()


def _name(function: Function) -> str:
    return getattr(function, "__name__", type(function).__name__)
