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
from jmp_train.types import Function, PyTree

_FLOAT32 = Policy(np.float32, np.float32, np.float32)


class Functional(NamedTuple):
    """Initialisation and call of a module as pure functions."""

    init: Callable[[jax.Array], Any]
    """`init(key) -> params`, a tree of arrays in the precision's parameter dtypes."""
    apply: Function
    """`apply(params, *args, method="__call__", key=None, **kwargs)` calls a method of the module. A
    key becomes the random stream of dropout: `rngs=`, as the library spells it."""


Maker = Callable[[Policy, nnx.Rngs], nnx.Module | linen.Module]


def functional(make: Maker, precision: Precision, *example: Any) -> Functional:
    """Return a Flax module as functions.

    NNX: `make` constructs the module in the dtypes of the policy. Linen: the step casts parameters
    and inputs to the dtypes of the policy, and the module computes in them. In both, rules are put
    on the module by `apply_policy`.

    Args:
      make: `make(policy, rngs)` constructs the module; a Linen module may ignore both.
      precision: a policy, or rules. With rules, `make` gets the float32 policy.
      *example: arguments of a call, as arrays or shapes, for the initialisation of a Linen module.

    Raises:
      ValueError: for a rule that matches no module, and for a module with state besides parameters.
      TypeError: for a module of another library.

    >>> from jmp_train.policy.precision import get_precision
    >>> make = lambda policy, rngs: nnx.Linear(
    ...     2, 3, dtype=policy.compute_dtype, param_dtype=policy.param_dtype, rngs=rngs)
    >>> net = functional(make, get_precision("mixed_bfloat16"))
    >>> params = net.init(jax.random.key(0))
    >>> net.apply(params, jax.numpy.ones((1, 2))).dtype, params["kernel"].dtype
    (dtype(bfloat16), dtype('float32'))
    >>> net = functional(
    ...     lambda policy, rngs: linen.Dense(3),
    ...     get_precision([("**", "mixed_bfloat16")]),
    ...     jax.ShapeDtypeStruct((1, 2), "float32"),
    ... )
    >>> net.apply(net.init(jax.random.key(0)), jax.numpy.ones((1, 2))).dtype
    dtype('float32')
    """
    policy = _FLOAT32 if precision.rules.entries else precision.model
    made: list[Any] = []
    # Traced, so that no parameter is computed to learn the library.
    jax.eval_shape(lambda key: made.append(make(policy, _streams(key))), jax.random.key(0))
    (module,) = made
    if isinstance(module, linen.Module):
        return _of_linen(make(policy, _streams(jax.random.key(0))), precision, example)
    if isinstance(module, nnx.Module):
        return _of_nnx(make, policy, precision)
    raise TypeError(f"the network is {type(module)}; expected an nnx.Module or a linen.Module")


def _of_nnx(make: Maker, policy: Policy, precision: Precision) -> Functional:
    def build(key: jax.Array) -> Any:
        module: Any = make(policy, _streams(key))
        rules = precision.rules
        return _nnx.apply_policy(module, rules) if rules.entries else module

    graph, _, rest = nnx.split(nnx.eval_shape(build, jax.random.key(0)), nnx.Param, ...)
    found = {type(variable).__name__ for _, variable in nnx.to_flat_state(rest)}
    _refuse_state(sorted(found))

    def init(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

    def apply(
        params: PyTree, *args: Any, method: str = "__call__", key: Any = None, **kwargs: Any
    ) -> Any:
        streams = {} if key is None else {"rngs": nnx.Rngs(dropout=key)}
        return getattr(nnx.merge(graph, params), method)(*args, **streams, **kwargs)

    return Functional(init, apply)


def _of_linen(module: Any, precision: Precision, example: Any) -> Functional:
    if precision.rules.entries:
        module = _linen.apply_policy(module, precision.rules)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), example)
    streams = {name: jax.random.key(0) for name in ("params", "dropout")}
    shapes = jax.eval_shape(lambda: module.init(streams, *zeros))
    _refuse_state(sorted(set(shapes) - {"params"}))

    def init(key: jax.Array) -> Any:
        params = module.init({"params": key, "dropout": key}, *zeros).get("params", {})
        return precision.cast_to_param(params)

    def apply(
        params: PyTree, *args: Any, method: str = "__call__", key: Any = None, **kwargs: Any
    ) -> Any:
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, *args, rngs=rngs, method=method, **kwargs)

    return Functional(init, apply)


def _streams(key: jax.Array) -> nnx.Rngs:
    """Random streams of a construction: parameters from the key, others from one derived from it."""
    return nnx.Rngs(jax.random.fold_in(key, 0), params=key)


def _refuse_state(kinds: list[str]) -> None:
    if kinds:
        raise ValueError(
            f"the network has state besides parameters ({', '.join(kinds)}); expected parameters "
            "alone: pass the random streams of dropout in the call, and train batch statistics with "
            "make_step(...).init(params, model_state=...) (docs/training.md)"
        )
