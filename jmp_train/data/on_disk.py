"""Arrays in .npy and .npz files that are read a batch at a time, however large they are."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jmp_train.data.dataset import DataError
from jmp_train.types import Batch


class Stored(NamedTuple):
    """An array in a file."""

    file: Path
    offset: int
    """Of its first number, in bytes."""
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        """The size of an example."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class ArraysOnDisk:
    """A source of the examples in arrays that stay in their files.

    A batch is read by one system call for each example and array, so nothing but the batch is in the
    memory of the process, and a file that vanishes or is cut is an error. (A memory map would end the
    process with SIGBUS there.)

    Args:
      arrays: by name; their leading axes are equal.

    Raises:
      DataError: for arrays of different numbers of examples, or of Python objects.
    """

    def __init__(self, arrays: dict[str, Stored]):
        for name, array in arrays.items():
            if not array.shape:
                raise DataError(
                    f"{array.file}: {name!r} has no axes; expected a leading axis of examples"
                )
        sizes = {name: array.shape[0] for name, array in arrays.items()}
        if len(set(sizes.values())) > 1:
            shown = ", ".join(f"{name!r} has {size}" for name, size in sizes.items())
            raise DataError(f"{shown} examples; expected the same number in every array")
        self._arrays = arrays
        self._opened: dict[Path, int] = {}

    def __len__(self) -> int:
        return next(iter(self._arrays.values())).shape[0]

    def __getitem__(self, index: int) -> Batch:
        return {name: array[0] for name, array in self.take(np.array([index])).items()}

    def take(self, rows: np.ndarray) -> Batch:
        """Return the examples with these indices as a batch.

        Raises:
          DataError: for a file that cannot be read, or is shorter than it was.
        """
        return {name: self._rows(array, rows.tolist()) for name, array in self._arrays.items()}

    @property
    def classes(self) -> int | None:
        """The number of classes, if `label` has every integer from 0."""
        label = self._arrays.get("label")
        if label is None or label.dtype.kind not in "iu":
            return None
        found = np.unique(self._rows(label._replace(shape=(1, *label.shape)), [0]))
        whole = len(found) > 1 and found[0] == 0 and found[-1] == len(found) - 1
        return len(found) if whole else None

    def _rows(self, array: Stored, rows: list[int]) -> np.ndarray:
        found = np.empty((len(rows), *array.shape[1:]), array.dtype)
        buffer = memoryview(found.reshape(len(rows), -1).view(np.uint8))
        try:
            descriptor = self._descriptor(array.file)
            for place, row in enumerate(rows):
                start = array.offset + row * array.row_bytes
                size = os.preadv(descriptor, [buffer[place]], start)
                if size < array.row_bytes:
                    raise DataError(
                        f"{array.file} has become shorter; expected {array.shape[0]} examples"
                    )
        except OSError as error:
            raise DataError(f"{array.file} cannot be read: {error.strerror}") from None
        return found

    def _descriptor(self, file: Path) -> int:
        if file not in self._opened:
            self._opened[file] = os.open(file, os.O_RDONLY)
        return self._opened[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # for a worker process

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_opened", {}).values():
            os.close(descriptor)
