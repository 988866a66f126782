"""Examples to predict on, checked against the spec of the data that a run was trained on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train.data.dataset import DataError
from jmp_train.spec import DataSpec
from jmp_train.types import Function


class Reads(dict[str, Any]):
    """A batch that remembers which of its arrays were read."""

    def __init__(self, arrays: Mapping[str, Any]):
        super().__init__(arrays)
        self.names: dict[str, None] = {}

    def __getitem__(self, name: str) -> Any:
        self.names[name] = None
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names[name] = None
        return super().get(name, default)


def arrays_read(function: Function, spec: DataSpec) -> tuple[str, ...]:
    """Return the names of the arrays of a batch that a function of the batch reads, by a trace.

    >>> import numpy as np
    >>> spec = DataSpec.of({"x": np.zeros((1, 3)), "y": np.zeros(1)}, classes=None)
    >>> arrays_read(lambda batch: batch["x"] + 1, spec)
    ('x',)
    """
    reads: list[Reads] = []

    def call(arrays: dict[str, Any]) -> Any:
        reads.append(Reads(arrays))
        return function(reads[-1])

    jax.eval_shape(call, abstract_batch(spec, 1))
    return tuple(name for name in reads[0].names if name in spec.example)


def abstract_batch(
    spec: DataSpec, size: Any, names: Collection[str] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of a batch of `size` examples; `names` are its arrays, None all."""
    return {
        name: jax.ShapeDtypeStruct((size, *x.shape), x.dtype)
        for name, x in spec.example.items()
        if names is None or name in names
    }


def check_inputs(batch: Any, names: tuple[str, ...], spec: DataSpec) -> dict[str, np.ndarray]:
    """Return the arrays that a model reads, in the dtypes of the spec.

    Floating numbers become the spec's floating dtype, and integers its integer dtype. Other arrays of
    the batch, such as labels, are left out.

    Args:
      batch: arrays by name, whose leading axis counts examples; or the array of a model that reads
        one.
      names: names of the arrays that the model reads.
      spec: spec of the data that it was trained on.

    Raises:
      DataError: for a missing array, another shape or kind of number, and unequal leading axes.

    >>> spec = DataSpec.of({"x": np.zeros((1, 3), np.float32)}, classes=None)
    >>> check_inputs({"x": [[1.0, 2.0, 3.0]]}, ("x",), spec)["x"].dtype
    dtype('float32')
    """
    if not isinstance(batch, Mapping):
        if len(names) != 1:
            raise DataError(f"expected a dict with {' and '.join(names)}, got {type(batch)}")
        batch = {names[0]: batch}
    missing = [name for name in names if name not in batch]
    if missing:
        given = " and ".join(map(repr, batch)) or "nothing"
        raise DataError(f"the input has {given}; expected {' and '.join(map(repr, names))}")
    arrays = {name: _check_array(name, batch[name], spec.example[name]) for name in names}
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        counts = " and ".join(f"{count} of {name!r}" for name, count in sizes.items())
        raise DataError(f"the input has {counts}; expected as many of each")
    return arrays


def _check_array(name: str, given: Any, wanted: jax.ShapeDtypeStruct) -> np.ndarray:
    try:
        array = np.asarray(given)
    except ValueError as error:  # a ragged list
        raise DataError(f"{name!r} is not an array: {error}") from None
    if array.ndim != len(wanted.shape) + 1 or array.shape[1:] != wanted.shape:
        expected = ", ".join(map(str, ("examples", *wanted.shape)))
        raise DataError(f"{name!r} has shape {array.shape}; expected ({expected})")
    kinds = (jnp.floating, jnp.integer, jnp.bool_, jnp.complexfloating)
    kind = next((kind for kind in kinds if jnp.issubdtype(wanted.dtype, kind)), None)
    if kind is None or not jnp.issubdtype(array.dtype, kind):
        raise DataError(
            f"{name!r} has dtype {array.dtype}; expected {jnp.dtype(wanted.dtype)}, as in training"
        )
    if kind is jnp.integer and array.size:
        limits = jnp.iinfo(wanted.dtype)
        for value in (array.min(), array.max()):
            if not int(limits.min) <= int(value) <= int(limits.max):
                raise DataError(
                    f"{name!r} has the number {value}; expected {limits.min} to {limits.max}, as "
                    f"{jnp.dtype(wanted.dtype)} takes"
                )
    with np.errstate(over="ignore"):
        cast = array.astype(wanted.dtype)
    if kind is jnp.floating:
        lost = np.isinf(cast) & ~np.isinf(array)
        if lost.any():
            raise DataError(
                f"{name!r} has {int(lost.sum())} numbers that overflow {jnp.dtype(wanted.dtype)}, the "
                f"first {array[lost][0]:g}; expected numbers in its range"
            )
    return cast


def padded_batches(
    arrays: Mapping[str, np.ndarray], size: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield batches of one size, in order, with the number of examples that are no padding.

    >>> [(count, b["x"].tolist()) for count, b in padded_batches({"x": np.arange(3)}, 2)]
    [(2, [0, 1]), (1, [2, 2])]
    """
    count = len(next(iter(arrays.values())))
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        yield min(size, count - start), {name: array[rows] for name, array in arrays.items()}
