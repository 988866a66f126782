"""A product whose columns are groups of features, each of them shared by the devices of `tensor`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jmp_train.sharding.tensor import tensor_size, used_in


@dataclasses.dataclass(frozen=True)
class ColumnGroups:
    """A product for `nnx.Linear(dot_general=)` whose output features are groups of equal size.

    Queries, keys and values of all heads in one kernel are three groups; a gate and a value are two. A
    share of neighbouring columns would be of one group, while a device needs its heads of all three. On
    a mesh with an axis `tensor`, each device uses its share of every group: the kernel is moved, which
    is smaller than the features.

    Attributes:
      shape: number of groups, then the axes of a group; the first of these is shared by the devices.

    >>> import jax.numpy as jnp
    >>> product = ColumnGroups((3, 2))
    >>> product(jnp.ones((1, 4)), jnp.ones((4, 6)), (((1,), (0,)), ((), ()))).shape
    (1, 6)
    """

    shape: tuple[int, ...]

    def __call__(
        self, x: jax.Array, kernel_IxO: jax.Array, dimension_numbers: Any, **options: Any
    ) -> jax.Array:
        """Return the product of features (..., I) and a kernel (I, O), as `jax.lax.dot_general` does.

        Returns:
          Features (..., O); with several devices on `tensor`, (..., *shape), whose last axes have the
          same values.
        """
        size = tensor_size()
        if size == 1:
            return jax.lax.dot_general(x, kernel_IxO, dimension_numbers, **options)
        kernel = kernel_IxO.reshape(kernel_IxO.shape[0], *self.shape)
        return jax.lax.dot_general(x, used_in(kernel, 2), dimension_numbers, **options)
