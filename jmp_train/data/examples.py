"""Examples that are read one at a time: sources with `len` and `[i]`, and checks of what they return."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jmp_train.data.bad import Bad, OnBad, next_good, unmarked
from jmp_train.data.dataset import DataError
from jmp_train.sources.checks import check_example, check_label, check_labels, check_like
from jmp_train.types import Batch, Function


class Examples:
    """A source of examples that are read one at a time, transformed and stacked.

    Args:
      items: has `len`, and `[i]` returns a dict of arrays, such as a list or a Grain data source. If it
        has `takes_rows`, True, its `take(rows)` returns the examples with an array of indices as a
        batch, where they need no transform of their own. If it has `describe(i)`, the text that returns,
        such as the name of a file, is in messages about that example.
      transform: `transform(example)` or `transform(example, rng)` returns a changed example; None
        changes nothing. Each example of each batch has its own random numbers.
      batch_transform: the same for a batch.
      numbers: the number of each item in messages, such as its index in a larger source; None: its
        index.
      classes: number of classes of an integer array `label`; None: its numbers have no upper bound.
      on_bad: "stop" raises an error for an example that cannot be read, is unlike the first one, or
        has a label out of range. "skip" puts the next good example in its place; a batch is then
        `Bad.marked` with the number of these.

    >>> source = Examples([{"x": 1}, {"x": 2}], transform=lambda example: {"x": example["x"] * 10})
    >>> source.draw(np.array([1, 0]), np.random.default_rng(0))
    {'x': array([20, 10], dtype=int32)}
    """

    def __init__(
        self,
        items: Any,
        transform: Function | None = None,
        batch_transform: Function | None = None,
        *,
        numbers: np.ndarray | None = None,
        classes: int | None = None,
        on_bad: OnBad = "stop",
    ):
        self._items = items
        self._transform = transform
        self._augment = batch_transform and checked_batch_transform(batch_transform)
        self._numbers = numbers
        self._classes = classes
        self._skips = on_bad == "skip"
        self._first: tuple[Batch, str] | None = None  # the first example drawn, and its name

    def __len__(self) -> int:
        return len(self._items)

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        """Return the examples with these indices as a batch.

        Raises:
          DataError: if an example cannot be read, has other names, shapes or dtypes than the first one
            drawn, or a label out of range; names its index. If examples are skipped: if too many in a
            row are bad.
        """
        return self.draw_part(rows, None, rng)

    def draw_part(
        self, rows: np.ndarray, part: np.ndarray | None, rng: np.random.Generator
    ) -> Batch:
        """Return a part of the batch that `draw` returns, given by the places in it; None for all.

        Examples beside the part are read only if there is a transform of a batch, which sees all of it.
        """
        whole = self._augment is not None
        places = range(len(rows)) if whole or part is None else part
        seeded = self._transform is not None and takes_generator(self._transform)
        generators = rng.spawn(len(rows)) if seeded else [rng] * len(rows)
        indices = [int(rows[place]) for place in places]
        batch, bad = self._read(indices, [generators[place] for place in places])
        if self._augment is not None:
            batch = self._augment(batch, rng)
            if part is not None:
                batch = {name: x[part] for name, x in batch.items()}
        return bad.marked(batch) if self._skips else batch

    @property
    def counts_apart(self) -> bool:
        """Whether processes that draw parts of a batch count the bad examples of their parts alone."""
        return self._skips and self._augment is None

    def held_out(self, start: int, stop: int) -> tuple[Batch, Bad]:
        """Return the examples in a range as a batch, without bad ones if they are skipped; it may be
        empty then.

        Raises:
          DataError: as `draw`.
        """
        rng = np.random.Generator(np.random.Philox(0))  # of no use: they have no random transforms
        indices, good, bad = list(range(start, stop)), [], Bad()
        if self._skips:
            for index in indices:
                try:
                    good.append(self._checked_one(index, rng))
                except DataError as error:
                    bad = bad.and_(Bad(1, str(error)))
            batch = _stacked(good) if good else {}
        else:
            batch, bad = self._read(indices, [rng] * len(indices))
        return (self._augment(batch, rng) if self._augment and batch else batch), bad

    def _read(self, indices: list[int], generators: list[np.random.Generator]) -> tuple[Batch, Bad]:
        """Return the examples with these indices, or good ones in their place, and what was bad."""
        names = _Names(self._name, indices)
        if self._transform is None and getattr(self._items, "takes_rows", False) is True:
            with contextlib.suppress(Exception):  # below, the error of a single example names it
                return self._taken(indices, names), Bad()
        if not self._skips:
            examples = [self._one(i, g) for i, g in zip(indices, generators, strict=True)]
            self._first = self._first or (examples[0], names[0])
            batch = stack(examples, names, like=self._first)
            check_labels(batch, self._classes, names)
            return batch, Bad()
        examples, bad = [], Bad()
        for index, generator in zip(indices, generators, strict=True):
            read = functools.partial(self._checked_one, rng=generator)
            example, left_out = next_good(read, index, len(self))
            examples.append(example)
            bad = bad.and_(left_out)
        return _stacked(examples), bad

    def _taken(self, indices: list[int], names: Sequence[str]) -> Batch:
        """Return the examples with these indices, read at once."""
        found = self._items.take(np.asarray(indices))
        batch = check_example(found, f"the batch with {names[0]}")
        first = {name: array[0] for name, array in batch.items()}
        self._first = self._first or (first, names[0])
        check_like(first, names[0], *self._first)
        check_labels(batch, self._classes, names)
        return batch

    def _checked_one(self, index: int, rng: np.random.Generator) -> Batch:
        example, name = self._one(index, rng), self._name(index)
        check_label(example, self._classes, name)
        self._first = self._first or (example, name)
        check_like(example, name, *self._first)
        return example

    @property
    def blocks(self) -> tuple[np.ndarray, int] | None:
        """The blocks that the examples are read in, as `order_of` expects them; None for none."""
        return row_blocks(self._items)

    def expect_like(self, other: Examples) -> None:
        """Expect the shapes and dtypes of the first example of others, if the transforms are the same."""
        if self._transform is other._transform:
            self._first = other._first

    def untransformed(self) -> Examples:
        """Return the same examples as they are read, none of which may be bad."""
        return Examples(self._items, numbers=self._numbers, classes=self._classes)

    def one(self, index: int) -> Batch:
        """Return the example with an index, without a leading axis.

        Raises:
          DataError: as `draw`.
        """
        batch, _ = unmarked(self.draw(np.array([index]), np.random.Generator(np.random.Philox(0))))
        return {name: array[0] for name, array in batch.items()}

    def _number(self, index: int) -> str:
        return f"example {index if self._numbers is None else self._numbers[index]}"

    def _name(self, index: int) -> str:
        """Return the number of an example, and what its source says about it."""
        text = None
        with contextlib.suppress(Exception):  # a method of another meaning, or none
            text = self._items.describe(index)
        return self._number(index) + (f" ({text})" if isinstance(text, str) else "")

    def _one(self, index: int, rng: np.random.Generator) -> Batch:
        number = self._number  # in an error of the source, which names the file itself
        try:
            example = self._items[index]
            if example is not None and self._transform is not None:
                number = self._name
                example = with_generator(self._transform)(example, rng)
        except DataError as error:
            raise DataError(f"{number(index)}: {error}") from error
        except Exception as error:  # of the user's source or transform, in a thread or a process
            raise DataError(f"{self._name(index)} cannot be read: {_what(error)}") from error
        name = self._name(index)
        if example is None:  # of a Grain dataset
            raise DataError(
                f"{name} was filtered out; expected dataset.to_iter_dataset() for a filtered dataset"
            )
        return check_example(example, name)


class _Names(Sequence[str]):
    """The names of examples, made when they are needed."""

    def __init__(self, name_of: Callable[[int], str], indices: list[int]):
        self._name_of, self._indices = name_of, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: Any) -> Any:
        return self._name_of(self._indices[place])


class Rows:
    """The examples of a dict of arrays, one at a time; `describe` as for `Examples`."""

    def __init__(self, arrays: Mapping[str, Any], describe: Callable[[int], str] | None = None):
        self._arrays, self.describe = arrays, describe

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def __getitem__(self, index: int) -> Batch:
        return {name: array[index] for name, array in self._arrays.items()}


class Subset:
    """The items of a source with some indices; they ascend for a source that is read in blocks."""

    def __init__(self, items: Any, indices: np.ndarray):
        self._items, self._indices = items, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self._items[int(self._indices[index])]

    def describe(self, index: int) -> str:
        """Return what the source says about an item."""
        return self._items.describe(int(self._indices[index]))

    @property
    def takes_rows(self) -> bool:
        """Whether the source reads several items at once."""
        return getattr(self._items, "takes_rows", False) is True

    def take(self, rows: np.ndarray) -> Batch:
        """Return items as a batch, of a source that `takes_rows`."""
        return self._items.take(self._indices[rows])

    @property
    def blocks(self) -> tuple[np.ndarray, int] | None:
        """The blocks of the source, with these items alone; None for none."""
        found = row_blocks(self._items)
        if found is None:
            return None
        starts = np.unique(np.searchsorted(self._indices, found[0]))
        return np.append(starts[starts < len(self)], len(self)), found[1]


def row_blocks(items: Any) -> tuple[np.ndarray, int] | None:
    """Return the blocks of a source that `takes_rows` and is read in blocks; None for others."""
    return getattr(items, "blocks", None) if getattr(items, "takes_rows", False) is True else None


def takes_generator(function: Function) -> bool:
    """Return whether a transform takes a random number generator: as an argument named `rng`, with a
    default or without, or as a second required argument.

    >>> takes_generator(lambda example: example), takes_generator(lambda example, rng: example)
    (False, True)
    >>> takes_generator(lambda example, rng=None: example), takes_generator(lambda x, scale=2: x)
    (True, False)
    """
    return _generator_argument(function) is not None


def with_generator(function: Function) -> Callable[[Any, np.random.Generator], Any]:
    """Return a transform as a function of two arguments."""
    argument = _generator_argument(function)
    if argument is None:
        return lambda value, rng: function(value)
    return (lambda value, rng: function(value, rng=rng)) if argument == "rng" else function


def _generator_argument(function: Function) -> str | None:
    """Return "rng" for an argument of that name, "second" for a second required one; else None."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function of C
        return None
    if any(
        p.name == "rng" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters
    ):
        return "rng"
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return "second" if len(required) > 1 else None


def checked_batch_transform(function: Function) -> Callable[[Batch, np.random.Generator], Batch]:
    """Return the transform of a batch as a function of a batch and a generator.

    It raises DataError where the transform raises, or returns no dict of arrays.
    """
    call = with_generator(function)

    def checked(batch: Batch, rng: np.random.Generator) -> Batch:
        try:
            changed = call(batch, rng)
        except DataError:
            raise
        except Exception as error:  # of the user's code
            raise DataError(f"batch_transform failed: {_what(error)}") from error
        return check_example(changed, "the batch that batch_transform returned")

    return checked


def stack(
    examples: list[Batch], names: Sequence[str], *, like: tuple[Batch, str] | None = None
) -> Batch:
    """Return examples as a batch.

    Args:
      examples: dicts of arrays.
      names: the name of each in messages.
      like: an example that they are expected to be like, and its name; None: the first of them.

    Raises:
      DataError: if an example differs from that in names, shapes or dtypes.
    """
    first, first_name = like or (examples[0], names[0])
    for example, name in zip(examples, names, strict=True):
        check_like(example, name, first, first_name)
    return _stacked(examples)


def _stacked(examples: list[Batch]) -> Batch:
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def regroup(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Yield the rows of batches once, in order, in batches of a size; the last one may have fewer."""
    rest: Batch | None = None
    for batch in batches:
        if rest is not None:
            batch = {key: np.concatenate([rest[key], value]) for key, value in batch.items()}
        count = len(next(iter(batch.values())))
        whole = count - count % size
        for start in range(0, whole, size):
            yield {key: value[start : start + size] for key, value in batch.items()}
        rest = {key: value[whole:] for key, value in batch.items()} if whole < count else None
    if rest is not None:
        yield rest


def _what(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
