"""Casts of stored parameters, which refuse an overflow."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train.errors import UsageError
from jmp_train.types import DTypeLike, PyTree


def cast_array(name: str, x: Any, dtype: DTypeLike, *, instead: str) -> Any:
    """Return an array in another floating dtype; other arrays unchanged.

    Args:
      name: name of the array, for the error.
      x: the array.
      dtype: a floating dtype.
      instead: end of the error, which says what is expected.

    Raises:
      UsageError: if finite numbers become infinite.

    >>> cast_array("w", np.float32([1.0]), "bfloat16", instead="float32").dtype
    dtype(bfloat16)
    """
    dtype = jnp.dtype(dtype)
    if x.dtype == dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    host = np.asarray(x)
    with np.errstate(over="ignore"):
        cast = host.astype(dtype)
    lost = np.isinf(cast) & np.isfinite(host)
    if lost.any():
        raise UsageError(
            f"{int(lost.sum())} numbers of {name!r} overflow {dtype}, the largest of them "
            f"{float(np.abs(host[lost].astype(np.float32)).max()):g}; expected {instead}"
        )
    return cast


def cast_like(params: PyTree, wanted: PyTree) -> PyTree:
    """Return parameters in the dtypes of a tree of shapes.

    Raises:
      UsageError: if finite numbers become infinite.
    """

    def cast(path: Any, x: Any, like: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        instead = "a policy with float32 parameters, such as mixed_float16"
        return jnp.asarray(cast_array(name, x, like.dtype, instead=instead))

    return jax.tree_util.tree_map_with_path(cast, params, wanted)
