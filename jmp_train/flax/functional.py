"""Flax modules as pure functions of their parameters, under a precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen, nnx

from jmp_train.flax import _linen, _nnx
from jmp_train.policy.policy import Policy
from jmp_train.policy.precision import Precision
from jmp_train.types import PyTree

_FLOAT32 = Policy(np.float32, np.float32, np.float32)


class Functional(NamedTuple):
    """Initialisation and call of a module as pure functions."""

    init: Callable[[jax.Array], Any]
    """`init(key) -> params`, a tree of arrays in the precision's parameter dtypes."""
    apply: Callable[..., Any]
    """`apply(params, *args, method="__call__", **kwargs)` calls a method of the module."""


def functional_nnx(
    make: Callable[[Policy, nnx.Rngs], nnx.Module], precision: Precision
) -> Functional:
    """Return an NNX module as functions.

    Args:
      make: `make(policy, rngs)` constructs the module with the policy's compute and parameter
        dtypes.
      precision: its policy is passed to `make`. If it has rules, `make` constructs the module in
        float32, and `apply_policy` puts the rules on it.

    Raises:
      ValueError: for a rule that matches no module.

    >>> from jmp_train.policy.precision import get_precision
    >>> make = lambda policy, rngs: nnx.Linear(
    ...     2, 3, dtype=policy.compute_dtype, param_dtype=policy.param_dtype, rngs=rngs)
    >>> net = functional_nnx(make, get_precision("mixed_bfloat16"))
    >>> params = net.init(jax.random.key(0))
    >>> net.apply(params, jax.numpy.ones((1, 2))).dtype, params["kernel"].dtype
    (dtype(bfloat16), dtype('float32'))
    """

    def build(key: jax.Array) -> nnx.Module:
        rngs = nnx.Rngs(params=key)
        if precision.rules.entries:
            return _nnx.apply_policy(make(_FLOAT32, rngs), precision.rules)
        return make(precision.model, rngs)

    graph, *_ = nnx.split(nnx.eval_shape(build, jax.random.key(0)), nnx.Param, ...)

    def init(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

    def apply(params: PyTree, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        return getattr(nnx.merge(graph, params), method)(*args, **kwargs)

    return Functional(init, apply)


def functional_linen(module: linen.Module, precision: Precision, *example: Any) -> Functional:
    """Return a Linen module as functions.

    Args:
      module: the module, without a precision.
      precision: if it has rules, `apply_policy` puts them on the module. Under a policy the step
        casts parameters and inputs, and the module computes in their dtype.
      *example: arguments of a call, as arrays or shapes, for the initialisation.

    >>> from jmp_train.policy.precision import get_precision
    >>> from jmp_train.policy.rules import Rules
    >>> precision = get_precision(Rules([("**", "mixed_bfloat16")]))
    >>> example = jax.ShapeDtypeStruct((1, 2), "float32")
    >>> net = functional_linen(linen.Dense(3), precision, example)
    >>> net.apply(net.init(jax.random.key(0)), jax.numpy.ones((1, 2))).dtype
    dtype('float32')
    """
    if precision.rules.entries:
        module = _linen.apply_policy(module, precision.rules)

    def init(key: jax.Array) -> Any:
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), example)
        params = module.init(key, *zeros)["params"]
        return precision.cast_to_param(params)

    def apply(params: PyTree, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        return module.apply({"params": params}, *args, method=method, **kwargs)

    return Functional(init, apply)
