"""The spec of a data set: shapes and dtypes of one example, and the number of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jmp_train.types import Batch, Json


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

    def to_json(self) -> Json:
        """Return the spec as JSON values, for spec.json in the directory of a run.

        >>> import numpy as np
        >>> spec = DataSpec.of({"image": np.zeros((5, 8, 8), np.float32)}, classes=10)
        >>> spec.to_json()
        {'example': {'image': {'shape': [8, 8], 'dtype': 'float32'}}, 'classes': 10}
        """
        example = {
            name: {"shape": list(x.shape), "dtype": jnp.dtype(x.dtype).name}
            for name, x in self.example.items()
        }
        return {"example": example, "classes": self.class_count}

    @classmethod
    def from_json(cls, values: Json) -> DataSpec:
        """Return the spec that `to_json` returned as JSON values.

        Raises:
          KeyError, TypeError or ValueError: for other values.
        """
        example = {
            name: jax.ShapeDtypeStruct(tuple(x["shape"]), jnp.dtype(x["dtype"]))
            for name, x in values["example"].items()
        }
        return cls(example, values["classes"])
