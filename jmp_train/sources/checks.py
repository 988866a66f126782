"""Checks of the examples that a source returns."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jmp_train.errors import DataError
from jmp_train.types import Batch


def check_labels(batch: Batch, classes: int | None, names: Sequence[str]) -> None:
    """Raise DataError for an integer array `label` with a number that is not a class.

    Args:
      batch: arrays whose leading axis counts examples.
      classes: number of classes; None: there is no upper bound.
      names: the name of each example.
    """
    label = batch.get("label")
    if label is None or label.dtype.kind not in "iu" or not label.size:
        return
    if label.min() >= 0 and (classes is None or label.max() < classes):
        return
    bad = (label < 0) | (label >= (2**31 if classes is None else classes))
    first = np.unravel_index(int(bad.argmax()), bad.shape)
    raise DataError(
        f"{names[int(first[0])]}: 'label' is {label[first]}; {expected_labels(classes)}"
    )


def check_label(example: Batch, classes: int | None, name: str) -> None:
    """Raise DataError for an example whose `label` is not a class, as `check_labels`."""
    if "label" in example:
        check_labels({"label": example["label"][None]}, classes, [name])


def expected_labels(classes: int | None) -> str:
    """Return what the numbers of an integer array `label` are expected to be."""
    if classes is None:
        return "expected integers from 0, or another name than 'label' if they are not classes"
    return f"expected 0 to {classes - 1}, for classes is {classes}"


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


def check_like(example: Batch, name: str, first: Batch, first_name: str) -> None:
    """Raise DataError for an example that differs from the first one in names, shapes or dtypes."""
    if example.keys() != first.keys():
        raise DataError(
            f"{name} has {', '.join(example)}; expected {', '.join(first)}, as in {first_name}"
        )
    for key, array in example.items():
        for attribute in ("shape", "dtype"):
            given, expected = getattr(array, attribute), getattr(first[key], attribute)
            if given != expected:
                raise DataError(
                    f"{name}: {key!r} has the {attribute} {given}; expected {expected}, as in "
                    f"{first_name}"
                )


def _what(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
