"""A parameter of which each device has a share, before it is gathered."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

GATHERED = "fsdp"
"""The axis whose shares are gathered; products are computed in shares of the axis `tensor`."""


class Share:
    """A parameter, or a part of one, that is not gathered yet.

    Args:
      array: its values, in the dtype that the parameter is stored in.
      axes: the mesh axes that each of its axes is split by.
      mesh: the mesh.
      dtype: the dtype that it is cast to before it is gathered.
      reduce_dtype: dtype of the sum of its gradient over the devices; None: that of the gradient.
    """

    def __init__(
        self,
        array: Any,
        axes: Sequence[tuple[str, ...]],
        mesh: Mesh,
        dtype: np.dtype,
        reduce_dtype: np.dtype | None,
    ):
        self.array, self.axes, self._mesh = array, tuple(axes), mesh
        self.dtype, self.reduce_dtype = dtype, reduce_dtype
        self._gathered: Any = None

    @classmethod
    def of(cls, array: Any, spec: P, mesh: Mesh, reduce_dtype: np.dtype | None) -> Any:
        """Return a parameter by its spec; one that needs no care, as it is."""
        names = [(n,) if isinstance(n, str) else tuple(n or ()) for n in spec]
        axes = (*names, *[()] * (array.ndim - len(names)))
        if reduce_dtype is None and not any(GATHERED in names for names in axes):
            return array
        return cls(array, axes, mesh, np.dtype(array.dtype), reduce_dtype)

    def like(self, array: Any, axes: Sequence[tuple[str, ...]] | None = None) -> Share:
        """Return a part of this one."""
        axes = self.axes if axes is None else axes
        return Share(array, axes, self._mesh, self.dtype, self.reduce_dtype)

    def cast(self, dtype: Any) -> Share | None:
        """Return this in another dtype; None for a wider one, and for another one than it was cast to
        before: what is gathered has then been rounded as the function says."""
        dtype = np.dtype(dtype)
        if self.dtype not in (self.array.dtype, dtype):
            return None
        if dtype.itemsize > self.dtype.itemsize or not jnp.issubdtype(dtype, jnp.floating):
            return None
        return Share(self.array, self.axes, self._mesh, dtype, self.reduce_dtype)

    def sharding(self, *, gathered: bool) -> NamedSharding:
        """Return the sharding of its shares, or of what they are gathered to."""
        left = [[n for n in names if not (gathered and n == GATHERED)] for names in self.axes]
        return NamedSharding(self._mesh, P(*(tuple(names) or None for names in left)))

    def gathered(self) -> Any:
        """Return its values, whole on each device but for what the axis `tensor` splits."""
        if self._gathered is None:
            places = self.sharding(gathered=False), self.sharding(gathered=True)
            self._gathered = _gather(self.array, *places, self.dtype)
        return self._gathered


def gather_values(
    x: jax.Array, share: NamedSharding, whole: NamedSharding, dtype: np.dtype
) -> jax.Array:
    """Return an array cast, then gathered."""
    x = jax.lax.with_sharding_constraint(x.astype(dtype), share)
    return jax.lax.with_sharding_constraint(x, whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: jax.Array, share: Any, whole: Any, dtype: np.dtype) -> jax.Array:
    return gather_values(x, share, whole, dtype)


def _gather_forward(x: jax.Array, share: Any, whole: Any, dtype: np.dtype) -> Any:
    return gather_values(x, share, whole, dtype), jnp.zeros(0, x.dtype)


def _gather_backward(share: Any, whole: Any, dtype: np.dtype, stored: Any, g: jax.Array) -> Any:
    del whole, dtype
    return (jax.lax.with_sharding_constraint(g, share).astype(stored.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)
