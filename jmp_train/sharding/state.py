"""Shardings of a whole training state, which follow its parameters."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jmp_train.sharding.mesh import replicated
from jmp_train.types import PyTree


def follow(tree: PyTree, params: PyTree, shardings: PyTree, mesh: Mesh) -> PyTree:
    """Return shardings for a tree, such as an optimizer's state, that follow those of parameters.

    A leaf whose path ends with that of a parameter, and that has its shape, such as a moment, a moving
    average or a master weight, lies where the parameter lies. Any other leaf, such as a count, is on
    each device.

    Args:
      tree: arrays, or their shapes and dtypes.
      params: the parameters, likewise.
      shardings: the sharding of each parameter, in their structure.
      mesh: the mesh.

    >>> mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    >>> params = {"w": jax.ShapeDtypeStruct((4,), "float32")}
    >>> sharding = NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    >>> state = {"mu": params, "count": jax.ShapeDtypeStruct((), "int32")}
    >>> found = follow(state, params, {"w": sharding}, mesh)
    >>> tuple(found["mu"]["w"].spec), tuple(found["count"].spec)
    (('fsdp',), ())
    """
    known: dict[Any, tuple[tuple[int, ...], NamedSharding]] = {
        path: (tuple(leaf.shape), sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }
    everywhere = replicated(mesh)

    def sharding_of(path: Any, leaf: Any) -> NamedSharding:
        for start in range(len(path) + 1):
            shape, sharding = known.get(path[start:], (None, everywhere))
            if shape == tuple(leaf.shape):
                return sharding
        return everywhere

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def share_bytes(arrays: PyTree, shardings: PyTree) -> int:
    """Return the bytes of the shares of arrays, or of their specs, on one device.

    >>> mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    >>> share_bytes(jax.ShapeDtypeStruct((4, 2), "float32"), replicated(mesh))
    32
    """
    return sum(
        math.prod(sharding.shard_shape(x.shape)) * _itemsize(x.dtype)
        for x, sharding in zip(jax.tree.leaves(arrays), jax.tree.leaves(shardings), strict=True)
    )


def _itemsize(dtype: Any) -> int:
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).itemsize
