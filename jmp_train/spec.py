"""What a network and a task must know of the data: shapes and dtypes of an example, and classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np


class DataSpec(NamedTuple):
    """Arrays of one example by name, and the number of classes.

    >>> spec = DataSpec.of({"image": np.zeros((5, 8, 8), np.float32)}, classes=10)
    >>> spec.example["image"].shape, spec.size("image")
    ((8, 8), 64)
    """

    example: Mapping[str, jax.ShapeDtypeStruct]
    """Arrays of one example, as the model is given them, without the batch axis."""
    classes: int
    """Labels, or tokens of a text, are 0 to classes - 1."""

    @classmethod
    def of(cls, batch: Mapping[str, np.ndarray | jax.Array], classes: int) -> DataSpec:
        """Return the spec of a batch, whose leading axis counts examples."""
        example = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in batch.items()}
        return cls(example, classes)

    def size(self, name: str) -> int:
        """Return how many numbers an array of one example holds."""
        return math.prod(self.example[name].shape)
