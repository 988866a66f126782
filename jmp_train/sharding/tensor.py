"""Where a network uses its parameters and activations on a mesh whose axis `tensor` splits products."""

from __future__ import annotations

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jmp_train.sharding.mesh import AXES, BATCH_AXES


def tensor_size() -> int:
    """Return the number of devices that share each product, where this is traced.

    1 without a mesh, and inside `jax.shard_map`, where a function splits its products itself.

    >>> tensor_size()
    1
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or tuple(mesh.axis_names) != AXES:
        return 1
    by_compiler = all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh.shape["tensor"] if by_compiler else 1


def used_in(x: jax.Array, axis: int | None) -> jax.Array:
    """Return a parameter, of which a device uses a share along an axis, or the whole.

    The share of a device where a parameter is stored need not be the one that it uses: a kernel whose
    columns are the queries, the keys and the values of all heads is used by heads. Under
    `Sharded`, the parameter is moved after its cast and before it is gathered over `fsdp`, and its
    gradient back after its sum over the devices.

    Args:
      x: the parameter, cast or not, any dtype.
      axis: the axis of which each device of `tensor` uses a share; None: each uses the whole. An axis
        that they do not divide is used whole.

    Returns:
      The same array; without a mesh, or with one device on `tensor`, `x` itself.

    >>> x = jax.numpy.ones((2, 4))
    >>> used_in(x, 1) is x
    True
    """
    size = tensor_size()
    if size == 1:
        return x
    if axis is None or x.shape[axis] % size:
        return jax.lax.with_sharding_constraint(x, P(*[None] * x.ndim))
    return jax.lax.with_sharding_constraint(
        x, P(*("tensor" if i == axis else None for i in range(x.ndim)))
    )


def whole_features(x: jax.Array) -> jax.Array:
    """Return activations of which each device has all features of its share of the batch.

    Without it, the compiler may split what lies between two products by `tensor` in other ways, such as
    by examples, and gather the kernels instead.

    Args:
      x: activations, (batch, ...), any dtype.

    Returns:
      The same array; without a mesh, or with one device on `tensor`, `x` itself.

    >>> x = jax.numpy.ones((2, 4))
    >>> whole_features(x) is x
    True
    """
    if tensor_size() == 1:
        return x
    mesh = jax.sharding.get_abstract_mesh()
    divides = x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    first = BATCH_AXES if divides else P.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, P(first, *[None] * (x.ndim - 1)))
