"""Shardings of a whole training state, which follow its parameters."""

from __future__ import annotations

from typing import Any

import jax
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
