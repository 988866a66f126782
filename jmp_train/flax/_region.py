"""Casts at the inputs and outputs of a module, for Linen and NNX."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from jmp_train._autocast.regions import compute_in, store_as
from jmp_train.policy.rules import Rules
from jmp_train.types import DTypeLike, Function, PyTree

_FLOAT32 = np.dtype(np.float32)
HALF = (np.dtype(np.float16), np.dtype(jax.numpy.bfloat16))


class ModuleRegion(NamedTuple):
    """Dtypes of one module; hashable, so it may be a static field of the module."""

    compute: np.dtype
    widen: bool  # cast inputs to float32, because the module computes in it and its parent does not
    output: np.dtype | None  # dtype of the outputs; None does not cast them


def region_of(rules: Rules, path: str) -> ModuleRegion:
    """Return the region of the module at a path.

    The inputs of the model itself are not cast. Its caller casts its outputs.
    """
    policy = rules.policy_of(path)
    if not path:
        return ModuleRegion(policy.compute_dtype, widen=False, output=None)
    parent = rules.policy_of(path.rpartition("/")[0])
    output = policy.compute_dtype if policy == parent else policy.output_dtype
    return ModuleRegion(
        policy.compute_dtype,
        widen=policy.compute_dtype == _FLOAT32 and parent.compute_dtype != _FLOAT32,
        output=None if policy == parent and output == _FLOAT32 else output,
    )


def run(region: ModuleRegion, method: Function, args: PyTree, kwargs: PyTree) -> Any:
    """Call a module's method in its region."""
    with compute_in(region.compute):
        if region.widen:
            args, kwargs = _stored_as((args, kwargs), _FLOAT32)
        out = method(*args, **kwargs)
        return out if region.output is None else _stored_as(out, region.output)


def _stored_as(tree: PyTree, dtype: np.dtype) -> Any:
    """Store the arrays of a tree in a dtype; scalars, which may be losses, are not cast."""
    return jax.tree.map(lambda x: store_as(x, dtype) if _is_array(x) and x.ndim else x, tree)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array)


def is_half(dtype: DTypeLike | None) -> bool:
    """Return whether the `dtype` of a layer is a half-precision one, which a rule replaces."""
    return dtype is not None and np.dtype(dtype) in HALF
