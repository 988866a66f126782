"""Shared parts of the transformations for parameters narrower than float32.

These transformations determine every bit of a parameter's new value. An update that is added, as
Optax's updates are, cannot express that: where a parameter falls from 1 to 2^-30, no float32 u
makes `1 + u` round to it, because float32 spaces its values near -1 by 2^-24. `BitUpdate` stores
the difference of the two bit patterns instead and defines its own addition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmp_train.numerics.dtypes import is_floating
from jmp_train.numerics.rounding import NARROW_FORMATS, to_float32
from jmp_train.types import DTypeLike, Function, PyTree


class NarrowParameters(optax.GradientTransformationExtraArgs):
    """A transformation that takes parameters narrower than float32 without a cast.

    `fp32_state` returns it unchanged, and so does `make_step`, which calls `fp32_state`.
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BitUpdate:
    """An update whose sum with its parameter is the new parameter, bit for bit.

    `old + BitUpdate(bits(new) - bits(old))` is `new` for every pair of bit patterns, signed zeros,
    subnormals, infinities and NaN included, because integers modulo 2^16 form a group. A
    difference of zero leaves the parameter unchanged. `optax.apply_updates` needs no change.

    A `BitUpdate` is a pytree with one leaf. It may leave jit and pass through `lax.scan`,
    `lax.cond` and `jnp.where`. It is not a number: put a transformation that scales or averages
    updates inside the transformation that made it. Adding a scaled `BitUpdate` raises a TypeError.

    Attributes:
      difference: difference of the bit patterns, modulo 2^16 or 2^8; uint16 or uint8, of the
        parameter's shape.

    >>> update = BitUpdate.between(jnp.bfloat16(1.0), jnp.bfloat16(2.0**-30))
    >>> jnp.bfloat16(1.0) + update
    Array(9.31323e-10, dtype=bfloat16)
    """

    difference: PyTree

    __array_ufunc__ = None  # so that a NumPy array leaves the addition to __radd__

    @classmethod
    def between(cls, old: PyTree, new: PyTree) -> BitUpdate:
        """Return the update from `old` to `new`, two arrays of one narrow dtype and shape."""
        return cls(_bits(new) - _bits(old))

    def __radd__(self, old: PyTree) -> jax.Array:
        dtype, unsigned = jnp.result_type(old), jnp.result_type(self.difference)
        if unsigned != _unsigned(dtype):
            raise TypeError(
                f"the update of a {dtype} parameter holds {unsigned}; expected the "
                f"{_unsigned(dtype)} that it was made with: put a transformation that changes "
                "updates inside the one for narrow parameters, as in "
                "master_weights(optax.chain(...))"
            )
        return _add_bits(old, self.difference)

    __add__ = __radd__


@jax.custom_jvp
def _add_bits(old: PyTree, difference: PyTree) -> jax.Array:
    return jax.lax.bitcast_convert_type(_bits(old) + difference, jnp.result_type(old))


@_add_bits.defjvp
def _no_derivative(primals: Any, tangents: Any) -> PyTree:
    # The derivative of a bit pattern would silently be zero.
    raise TypeError(
        "parameters under master_weights, bf16_remainder, kahan or stochastic_rounding cannot be "
        "differentiated through an update, which works on their bits; expected float32 parameters, "
        "as in the policy 'mixed_bfloat16'"
    )


def _unsigned(dtype: DTypeLike) -> np.dtype:
    return np.dtype(np.uint8 if jnp.finfo(dtype).bits == 8 else np.uint16)


def _bits(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return jax.lax.bitcast_convert_type(x, _unsigned(x.dtype))


def is_narrow(x: Any) -> bool:
    """Return whether an array is floating and narrower than float32."""
    dtype = jnp.result_type(x)
    return is_floating(dtype) and jnp.finfo(dtype).bits < 32


def check_narrow(name: str, params: PyTree, dtypes: tuple[np.dtype, ...] = NARROW_FORMATS) -> None:
    """Check the dtypes of parameters that are given to a transformation.

    Args:
      name: name of the transformation, for the error message.
      params: the parameters.
      dtypes: narrow dtypes that the transformation supports.

    Raises:
      ValueError: if no parameter is narrower than float32, or one is narrow and its dtype is not
        in `dtypes`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    expected = " or ".join(dtype.name for dtype in dtypes)
    for path, leaf in leaves:
        if is_narrow(leaf) and jnp.result_type(leaf) not in dtypes:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{name}: parameter {where!r} is {jnp.result_type(leaf)}; expected {expected} "
                "(or float32, which is left to the inner optimizer)"
            )
    # `optax.tree.map_params` calls `init` with a tree without leaves.
    if leaves and not any(is_narrow(leaf) for _, leaf in leaves):
        found = ", ".join(sorted({str(jnp.result_type(leaf)) for _, leaf in leaves}))
        raise ValueError(
            f"{name}: the parameters are {found}; expected some in {expected}. If they are in your "
            f"program, {name} must be the outermost transformation that sees them: "
            f"{name}(optax.chain(...)), not optax.chain(..., {name}(...)), in make_step"
        )


def map_narrow(function: Function, params: PyTree, *trees: PyTree) -> PyTree:
    """Return `function(param, *leaves)` for each narrow parameter, and None for the others.

    Args:
      function: called with a parameter and the corresponding leaf of each tree.
      params: the parameters.
      *trees: trees of the parameters' structure; a leaf may be a subtree or None.
    """
    leaves, treedef = _flatten(params)
    columns = [treedef.flatten_up_to(tree) for tree in trees]
    rows = zip(leaves, *columns, strict=True)
    return treedef.unflatten([function(*row) if is_narrow(row[0]) else None for row in rows])


def widened(params: PyTree, memory: PyTree = None) -> PyTree:
    """Return the float32 value of each narrow parameter, and None for the others."""
    del memory
    return map_narrow(to_float32, params)


def unzip_narrow(params: PyTree, pairs: Any) -> tuple[PyTree, PyTree]:
    """Split a tree of pairs from `map_narrow` into a tree of first and one of second elements."""
    first = map_narrow(lambda p, pair: pair[0], params, pairs)
    return first, map_narrow(lambda p, pair: pair[1], params, pairs)


def in_full(params: PyTree, full: PyTree) -> PyTree:
    """Return the parameters with each narrow one replaced by its float32 value.

    Args:
      params: the parameters.
      full: float32 values of the narrow parameters, from `map_narrow`.
    """
    return _merge(params, full, params)


def bit_updates(updates: PyTree, params: PyTree, new: PyTree) -> PyTree:
    """Return the updates with a `BitUpdate` for each narrow parameter.

    Args:
      updates: updates of the inner optimizer.
      params: parameters before the update.
      new: narrow parameters after the update, from `map_narrow`.
    """
    return _merge(params, map_narrow(BitUpdate.between, params, new), updates)


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """Apply updates to parameters of any dtype; otherwise the same as `optax.apply_updates`.

    JAX does not promote 8-bit floats, so Optax cannot add a float32 update to one. This function
    forms the sum in float32, as for a 16-bit parameter, and rounds it once.
    """

    def add(p: PyTree, u: PyTree) -> PyTree:
        if jnp.finfo(p.dtype).bits > 8 or isinstance(u, BitUpdate):
            p = jnp.asarray(p)
            return (p + u).astype(p.dtype)
        return (p.astype(jnp.float32) + u).astype(p.dtype)

    return jax.tree.map(add, params, updates)


def narrow_transformation(
    name: str,
    optimizer: optax.GradientTransformationExtraArgs,
    make_state: Callable[[Any, Any], Any],
    *,
    first: Callable[[Any, Any], Any],
    move: Callable[[Any, Any, Any, Any], tuple[PyTree, PyTree]],
    read: Callable[[Any, Any], Any] = widened,
    dtypes: tuple[np.dtype, ...] = NARROW_FORMATS,
) -> NarrowParameters:
    """Build the transformation that runs an optimizer in float32 over narrow parameters.

    The functions `first`, `move` and `read` define how one method keeps small updates. Each takes
    and returns whole trees, made with `map_narrow`. The memory is the tree that the method keeps
    in the state between updates.

    Args:
      name: name of the method, for error messages.
      optimizer: the inner optimizer under `fp32_state`.
      make_state: constructs the state from the inner optimizer's state and the memory.
      first: `first(params, values)` returns the first memory.
      move: `move(params, memory, values, updates)` returns the new narrow parameters and the new
        memory.
      read: `read(params, memory)` returns the float32 values that the inner optimizer sees.
      dtypes: narrow dtypes that the method supports.
    """

    def init(params: PyTree) -> PyTree:
        check_narrow(name, params, dtypes)
        values = widened(params)
        memory = first(params, values)
        return make_state(optimizer.init(in_full(params, values)), memory)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        inner_state, memory = state
        values = read(params, memory)
        full = in_full(params, values)
        updates, inner_state = optimizer.update(updates, inner_state, full, **extra_args)
        new, memory = move(params, memory, values, updates)
        return bit_updates(updates, params, new), make_state(inner_state, memory)

    return NarrowParameters(init, update)


def _flatten(params: PyTree) -> tuple[list[PyTree], Any]:
    if params is None:
        raise ValueError("the parameters are missing; expected update(updates, state, params)")
    return jax.tree.flatten(params)


def _merge(params: PyTree, narrow: PyTree, others: PyTree) -> PyTree:
    leaves, treedef = _flatten(params)
    rows = zip(leaves, treedef.flatten_up_to(narrow), treedef.flatten_up_to(others), strict=True)
    return treedef.unflatten([n if is_narrow(p) else other for p, n, other in rows])
