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
      used: the mesh axes that each of its axes is split by where it is used, but for `fsdp`; None: those
        that it is stored by.
    """

    def __init__(
        self,
        array: Any,
        axes: Sequence[tuple[str, ...]],
        mesh: Mesh,
        dtype: np.dtype,
        reduce_dtype: np.dtype | None,
        used: Sequence[tuple[str, ...]] | None = None,
    ):
        self.array, self.axes, self._mesh = array, tuple(axes), mesh
        self.dtype, self.reduce_dtype = dtype, reduce_dtype
        self.used = None if used is None else tuple(used)
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
        return Share(array, axes, self._mesh, self.dtype, self.reduce_dtype, self.used)

    def used_by(self, used: Sequence[tuple[str, ...]]) -> Share:
        """Return this, moved to other shares of the axis `tensor` before it is gathered."""
        return Share(self.array, self.axes, self._mesh, self.dtype, self.reduce_dtype, used)

    def cast(self, dtype: Any) -> Share | None:
        """Return this in another dtype; None for a wider one, and for another one than it was cast to
        before: what is gathered has then been rounded as the function says."""
        dtype = np.dtype(dtype)
        if self.dtype not in (self.array.dtype, dtype):
            return None
        if dtype.itemsize > self.dtype.itemsize or not jnp.issubdtype(dtype, jnp.floating):
            return None
        return Share(self.array, self.axes, self._mesh, dtype, self.reduce_dtype, self.used)

    @property
    def places(self) -> tuple[NamedSharding, ...]:
        """The shardings that it passes through: as it is stored, as it is moved, and gathered."""
        place = lambda axes: NamedSharding(self._mesh, P(*(tuple(names) or None for names in axes)))
        split = [tuple(n for n in names if n == GATHERED) for names in self.axes]
        if self.used is None:
            left = [tuple(n for n in names if n != GATHERED) for names in self.axes]
            return place(self.axes), place(left)
        moved = [(*ours, *theirs) for ours, theirs in zip(split, self.used, strict=True)]
        return place(self.axes), place(moved), place(self.used)

    def gathered(self) -> Any:
        """Return its values, whole on each device but for what the axis `tensor` splits."""
        if self._gathered is None:
            self._gathered = _gather(self.array, self.places, self.dtype)
        return self._gathered


Places = tuple[NamedSharding, ...]


def gather_values(x: jax.Array, places: Places, dtype: np.dtype) -> jax.Array:
    """Return an array cast, then moved through shardings, the last of them gathered."""
    x = x.astype(dtype)
    for place in places:
        x = jax.lax.with_sharding_constraint(x, place)
    return x


def scatter_gradient(g: jax.Array, places: Places) -> jax.Array:
    """Return the gradient of what was gathered, summed over the devices into shares as they are stored."""
    for place in places[-2::-1]:
        g = jax.lax.with_sharding_constraint(g, place)
    return g


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, places: Places, dtype: np.dtype) -> jax.Array:
    return gather_values(x, places, dtype)


def _gather_forward(x: jax.Array, places: Places, dtype: np.dtype) -> Any:
    return gather_values(x, places, dtype), jnp.zeros(0, x.dtype)


def _gather_backward(places: Places, dtype: np.dtype, stored: Any, g: jax.Array) -> Any:
    del dtype
    return (scatter_gradient(g, places).astype(stored.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)
