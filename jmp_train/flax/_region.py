"""Casts at the border of a module, in either library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jmp_train._autocast.regions import compute_in, store_as
from jmp_train.policy.rules import Rules

_FLOAT32 = np.dtype(np.float32)
HALF = (np.dtype(np.float16), np.dtype(jax.numpy.bfloat16))


class ModuleRegion(NamedTuple):
    """The dtypes of one module; hashable, as a module's static fields are."""

    compute: np.dtype
    widen: bool  # its inputs are taken back to float32: it computes in it, its parent does not
    leave: np.dtype | None  # the dtype of its outputs; None leaves them alone


def region_of(rules: Rules, path: str) -> ModuleRegion:
    """Return the region of the module at a path.

    The model itself takes what it is given, and its output is cast by whoever calls it.
    """
    policy = rules.policy_of(path)
    if not path:
        return ModuleRegion(policy.compute_dtype, widen=False, leave=None)
    parent = rules.policy_of(path.rpartition("/")[0])
    leave = policy.compute_dtype if policy == parent else policy.output_dtype
    return ModuleRegion(
        policy.compute_dtype,
        widen=policy.compute_dtype == _FLOAT32 and parent.compute_dtype != _FLOAT32,
        leave=None if policy == parent and leave == _FLOAT32 else leave,
    )


def run(region: ModuleRegion, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a module's method under its region."""
    with compute_in(region.compute):
        if region.widen:
            args, kwargs = _stored_as((args, kwargs), _FLOAT32)
        out = method(*args, **kwargs)
        return out if region.leave is None else _stored_as(out, region.leave)


def _stored_as(tree: Any, dtype: np.dtype) -> Any:
    """Store the arrays of a tree in a dtype; scalars, which may be losses, stay as they are."""
    return jax.tree.map(lambda x: store_as(x, dtype) if _is_array(x) and x.ndim else x, tree)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array)


def gives_way(dtype: Any) -> bool:
    """Return whether a layer's own `dtype` is a half-precision one, which a rule replaces."""
    return dtype is not None and np.dtype(dtype) in HALF
