"""Examples that are read one at a time: sources with `len` and `[i]`, and checks of what they return."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jmp_train.data.dataset import DataError
from jmp_train.types import Batch, Function


class Examples:
    """A source of examples that are read one at a time, transformed and stacked.

    Args:
      items: has `len`, and `[i]` returns a dict of arrays, such as a list or a Grain data source.
      transform: `transform(example)` or `transform(example, rng)` returns a changed example; None
        changes nothing. Each example of each batch has its own random numbers.
      batch_transform: the same for a batch.

    >>> source = Examples([{"x": 1}, {"x": 2}], transform=lambda example: {"x": example["x"] * 10})
    >>> source.draw(np.array([1, 0]), np.random.default_rng(0))
    {'x': array([20, 10], dtype=int32)}
    """

    def __init__(
        self,
        items: Any,
        transform: Function | None = None,
        batch_transform: Function | None = None,
    ):
        self._items = items
        self._transform = transform
        self._augment = batch_transform and with_generator(batch_transform)

    def __len__(self) -> int:
        return len(self._items)

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        """Return the examples with these indices as a batch.

        Raises:
          DataError: if an example cannot be read, or has other names, shapes or dtypes than the first
            of the batch; names its index.
        """
        indices = [int(row) for row in rows]
        seeded = self._transform is not None and takes_generator(self._transform)
        generators = rng.spawn(len(indices)) if seeded else [rng] * len(indices)
        examples = [self._one(i, g) for i, g in zip(indices, generators, strict=True)]
        batch = stack(examples, [f"example {i}" for i in indices])
        return batch if self._augment is None else self._augment(batch, rng)

    def _one(self, index: int, rng: np.random.Generator) -> Batch:
        name = f"example {index}"
        try:
            example = self._items[index]
            if example is not None and self._transform is not None:
                example = with_generator(self._transform)(example, rng)
        except DataError:
            raise
        except Exception as error:  # of the user's source or transform, in a thread or a process
            raise DataError(f"{name} cannot be read: {_what(error)}") from error
        if example is None:  # of a Grain dataset
            raise DataError(
                f"{name} was filtered out; expected dataset.to_iter_dataset() for a filtered dataset"
            )
        return check_example(example, name)


class Rows:
    """The examples of a dict of arrays, one at a time."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def __getitem__(self, index: int) -> Batch:
        return {name: array[index] for name, array in self._arrays.items()}


class Subset:
    """The items of a source with some indices."""

    def __init__(self, items: Any, indices: np.ndarray):
        self._items, self._indices = items, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        original = int(self._indices[index])
        try:
            return self._items[original]
        except Exception as error:  # of the user's source
            raise DataError(f"example {original} cannot be read: {_what(error)}") from error


def takes_generator(function: Function) -> bool:
    """Return whether a transform has a second required argument, for a random number generator.

    >>> takes_generator(lambda example: example), takes_generator(lambda example, rng: example)
    (False, True)
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function of C
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return len(required) > 1


def with_generator(function: Function) -> Callable[[Any, np.random.Generator], Any]:
    """Return a transform as a function of two arguments."""
    return function if takes_generator(function) else lambda value, rng: function(value)


def check_example(example: Any, name: str, what: str = "a dict of arrays by name") -> Batch:
    """Return an example with its values as arrays.

    Raises:
      DataError: if it is not a dict of numbers by name, with the name of the example.
    """
    if not isinstance(example, Mapping):
        if isinstance(example, (tuple, list)):
            hint = "such as transform=lambda pair: {'image': pair[0], 'label': pair[1]}"
            raise DataError(
                f"{name} is a {type(example).__name__} of {len(example)}; expected {what}, {hint}"
            )
        raise DataError(f"{name} is {reprlib.repr(example)}; expected {what}")
    if not example:
        raise DataError(f"{name} is an empty dict; expected {what}")
    return {key: _check_array(value, name, key) for key, value in example.items()}


def _check_array(value: Any, name: str, key: Any) -> np.ndarray:
    if not isinstance(key, str):
        raise DataError(f"{name} has the key {key!r}; expected the name of an array, a string")
    try:
        array = np.asarray(value)
    except Exception as error:  # a ragged list, or a tensor that refuses
        raise DataError(f"{name}: {key!r} is not an array: {_what(error)}") from error
    # Kind V: bfloat16 and the float8 formats of ml_dtypes.
    numeric = array.dtype.kind in "biufc" or (array.dtype.kind == "V" and not array.dtype.names)
    if not numeric:
        why = "Python objects" if array.dtype.hasobject else f"dtype {array.dtype}"
        raise DataError(f"{name}: {key!r} has {why}; expected numbers")
    return _in_32_bits(array, name, key)


def _in_32_bits(array: np.ndarray, name: str, key: str) -> np.ndarray:
    """Return 64-bit numbers in 32 bits, which JAX computes with."""
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):
            return array.astype(np.float32)
    if array.dtype not in (np.int64, np.uint64):
        return array
    if array.size and not (-(2**31) <= array.min() and array.max() < 2**31):
        raise DataError(
            f"{name}: {key!r} has integers beyond 32 bits; expected -2**31 to 2**31 - 1"
        )
    return array.astype(np.int32)


def stack(examples: list[Batch], names: list[str]) -> Batch:
    """Return examples as a batch.

    Raises:
      DataError: if an example differs from the first one in names, shapes or dtypes.
    """
    first = examples[0]
    for example, name in zip(examples, names, strict=True):
        if example.keys() != first.keys():
            raise DataError(
                f"{name} has {', '.join(example)}; expected {', '.join(first)}, as in {names[0]}"
            )
        for key, array in example.items():
            for attribute in ("shape", "dtype"):
                given, expected = getattr(array, attribute), getattr(first[key], attribute)
                if given != expected:
                    raise DataError(
                        f"{name}: {key!r} has the {attribute} {given}; expected {expected}, as in "
                        f"{names[0]}"
                    )
    return {key: np.stack([example[key] for example in examples]) for key in first}


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
