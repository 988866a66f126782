"""The spec of a data set: shapes and dtypes of one example, and the number of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jmp_train.errors import DataError
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
    class_names: tuple[str, ...] | None = None
    """The name of each class, in the order of the labels; None where the data do not say."""

    @classmethod
    def of(
        cls, batch: Batch, classes: int | None, class_names: tuple[str, ...] | None = None
    ) -> DataSpec:
        """Return the spec of a batch, whose leading axis counts examples.

        Raises:
          DataError: for complex numbers: losses, metrics and policies are of real ones.
        """
        for name, array in batch.items():
            if jnp.issubdtype(array.dtype, jnp.complexfloating):
                raise DataError(
                    f"{name!r} has complex numbers, {array.dtype}; expected real numbers, such as the "
                    "real and the imaginary parts in an array each"
                )
        example = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in batch.items()}
        return cls(example, classes, class_names)

    @property
    def classes(self) -> int:
        """The number of classes, or of tokens in the vocabulary.

        Raises:
          ValueError: if the data do not say.
        """
        if self.class_count is None:
            raise ValueError(
                "the number of classes is unknown; expected Data(..., classes=N), because the data "
                "have no integer 'label' in memory with every number from 0, of two classes or more"
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
        named = {} if self.class_names is None else {"class_names": list(self.class_names)}
        return {"example": example, "classes": self.class_count, **named}

    @classmethod
    def from_json(cls, values: Json) -> DataSpec:
        """Return the spec that `to_json` returned as JSON values.

        Raises:
          KeyError, TypeError or ValueError: for other values.
        """
        names = values.get("class_names")  # an earlier version had none
        if names is not None and not (
            isinstance(names, list) and all(isinstance(name, str) for name in names)
        ):
            raise TypeError(f"class_names is {names!r}")
        example = {
            name: jax.ShapeDtypeStruct(tuple(x["shape"]), jnp.dtype(x["dtype"]))
            for name, x in values["example"].items()
        }
        return cls(example, values["classes"], None if names is None else tuple(names))
