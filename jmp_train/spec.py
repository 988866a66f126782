"""The spec of a data set: shapes and dtypes of one example, and the number of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

from jmp_train.types import Batch


class DataSpec(NamedTuple):
    """Shapes and dtypes of one example by name, and the number of classes.

    >>> import numpy as np
    >>> spec = DataSpec.of({"image": np.zeros((5, 8, 8), np.float32)}, classes=10)
    >>> spec.example["image"].shape, spec.size("image")
    ((8, 8), 64)
    """

    example: Mapping[str, jax.ShapeDtypeStruct]
    """Shapes and dtypes of the arrays of one example, without the batch axis."""
    class_count: int | None
    """Number of classes, or of tokens in the vocabulary; labels are 0 to classes - 1. None where the
    data do not say."""

    @classmethod
    def of(cls, batch: Batch, classes: int | None) -> DataSpec:
        """Return the spec of a batch, whose leading axis counts examples."""
        example = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in batch.items()}
        return cls(example, classes)

    @property
    def classes(self) -> int:
        """The number of classes, or of tokens in the vocabulary.

        Raises:
          ValueError: if the data do not say.
        """
        if self.class_count is None:
            raise ValueError(
                "the number of classes is unknown; expected Data(..., classes=N), because the data "
                "have no integer 'label' in memory"
            )
        return self.class_count

    def size(self, name: str) -> int:
        """Return the number of elements in an array of one example."""
        return math.prod(self.example[name].shape)
