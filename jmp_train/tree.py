"""Functions on pytrees of arrays: casts of floating leaves, finiteness, selection, leaf names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train.numerics.dtypes import at_least_float32, half_dtype, is_floating, parse_dtype
from jmp_train.types import DTypeLike, PyTree

T = TypeVar("T")


def cast_floating(tree: T, dtype: DTypeLike) -> T:
    """Cast the floating array leaves of a pytree to `dtype`.

    A cast rounds to the nearest representable value, ties to even. In float16, magnitudes of 65,520
    and above become infinite. Integers, booleans, PRNG keys, None, strings, Python numbers and
    other objects are returned unchanged, as the same object, and so is an array already in `dtype`.
    NumPy arrays stay NumPy arrays.

    >>> import jax.numpy as jnp
    >>> cast_floating({"w": jnp.ones(2), "n": jnp.arange(2), "s": "id"}, jnp.bfloat16)["w"].dtype
    dtype(bfloat16)
    """
    dtype = parse_dtype(dtype)

    def cast(x: Any) -> Any:
        if not isinstance(x, (jax.Array, np.ndarray, np.generic)):
            return x
        if x.dtype == dtype or not is_floating(x.dtype):
            return x
        return x.astype(dtype)

    return jax.tree.map(cast, tree)


def cast_to_full(tree: T) -> T:
    """Cast floating leaves to float32; see `cast_floating`."""
    return cast_floating(tree, np.float32)


def widen_to_full(tree: T) -> T:
    """Cast floating leaves narrower than float32 to float32, and leave float64 unchanged.

    >>> import jax.numpy as jnp
    >>> widen_to_full({"w": jnp.ones(2, jnp.bfloat16)})["w"].dtype
    dtype('float32')
    """

    def widen(x: Any) -> Any:
        floating = isinstance(x, (jax.Array, np.ndarray, np.generic)) and is_floating(x.dtype)
        return cast_floating(x, at_least_float32(x.dtype)) if floating else x

    return jax.tree.map(widen, tree)


def cast_to_half(tree: T) -> T:
    """Cast floating leaves to `half_dtype()`; see `cast_floating`."""
    return cast_floating(tree, half_dtype())


def all_finite(tree: PyTree) -> jax.Array:
    """Return whether all numbers of a pytree are finite: a bool of shape ().

    >>> bool(all_finite({"a": jnp.ones(3)})), bool(all_finite({"a": jnp.array(jnp.inf)}))
    (True, False)
    """
    finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if _can_be_infinite(x)]
    return jnp.stack(finite).all() if finite else jnp.array(True)


def _can_be_infinite(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    return isinstance(x, (float, complex)) if dtype is None else jnp.issubdtype(dtype, jnp.inexact)


def select_tree(pred: Any, on_true: T, on_false: T) -> T:
    """Return `on_true` if `pred` is true, else `on_false`, leaf by leaf and bit for bit.

    One exception: on a CPU, XLA selects bfloat16 through float32, which preserves every number,
    -0.0 included, but gives every NaN the same payload.

    Args:
      pred: bool of shape ().
      on_true: a pytree of arrays.
      on_false: a pytree of the same structure, shapes and dtypes.

    Raises:
      AssertionError: if `pred` is not a boolean scalar.

    >>> select_tree(jnp.array(True), {"a": 1}, {"a": 2})
    {'a': Array(1, dtype=int32, weak_type=True)}
    """
    pred = jnp.asarray(pred)
    assert pred.ndim == 0 and pred.dtype == jnp.bool_, "expected boolean scalar"
    return jax.tree.map(
        lambda a, b: jax.lax.select(pred, *map(jnp.asarray, (a, b))), on_true, on_false
    )


def nonfinite_leaves(tree: PyTree) -> jax.Array:
    """Return a bool for each floating leaf of a pytree: whether it has an infinity or a NaN.

    `path_names` returns the names of the leaves in the same order. In a jitted function that also
    computes `all_finite` of the same tree, this costs nothing, because XLA computes the flags once.

    >>> nonfinite_leaves({"a": jnp.ones(3), "b": jnp.array([jnp.nan])})
    Array([False,  True], dtype=bool)
    """
    flags = [~jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
    return jnp.stack(flags) if flags else jnp.zeros(0, jnp.bool_)


def path_names(tree: PyTree) -> list[str]:
    """Return the path of each leaf, such as `"layers/0/kernel"`.

    >>> path_names({"layers": [{"kernel": 1}]})
    ['layers/0/kernel']
    """
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def path_name(path: Sequence[Any]) -> str:
    """Return a key path as text, without the `.value` of a Flax variable."""
    last = path[-1:] if path else ()
    if last and isinstance(last[0], jax.tree_util.GetAttrKey) and last[0].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def same_shapes(a: PyTree, b: PyTree) -> bool:
    """Return whether two trees of arrays have the same structure and shapes, whatever their dtypes.

    >>> same_shapes({"x": jnp.ones(2)}, {"x": jnp.zeros(2, jnp.bfloat16)}), same_shapes([1.0], (1.0,))
    (True, False)
    """
    shapes = lambda tree: [jnp.shape(x) for x in jax.tree.leaves(tree)]
    return jax.tree.structure(a) == jax.tree.structure(b) and shapes(a) == shapes(b)
