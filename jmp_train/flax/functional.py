"""A network of any kind as pure functions of its parameters and its state, under a precision."""

from __future__ import annotations

import functools
import inspect
import reprlib
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jmp_train._autocast.transform import autocast
from jmp_train.flax import _annotations, _linen, _nnx, _sown
from jmp_train.policy.policy import Policy
from jmp_train.policy.precision import Precision
from jmp_train.sharding.placement import Annotations
from jmp_train.tree import cast_floating
from jmp_train.types import Function, PyTree

_FLOAT32 = Policy(np.float32, np.float32, np.float32)

#: Flags of a call by the names that networks give them: True in training, or in evaluation.
_IN_TRAINING = ("train", "training", "is_training")
_IN_EVALUATION = ("deterministic", "use_running_average", "inference")


class Functional(NamedTuple):
    """Initialisation and call of a network as pure functions."""

    init: Callable[[jax.Array], tuple[Any, Any]]
    """`init(key) -> (params, state)`: trees of arrays. The parameters have the precision's parameter
    dtypes; the state is that of batch statistics and caches, or None. Sown values are not part of it."""
    apply: Function
    """`apply(params, state, *args, train=False, key=None, method="__call__", **kwargs)` calls a method
    and returns `(outputs, state)`."""
    has: Callable[[str], bool]
    """`has(method)` says whether the network has a method."""
    precision: Precision
    """The casts that remain to be done around the network, for `make_step`."""
    network: Function
    """`network(params, state)` returns the network with its arrays: an NNX module in evaluation; else
    a pair of a Linen module and its variables, or of the function `apply` and the parameters."""
    annotations: Callable[[], Annotations] = dict
    """`annotations()` returns the mesh axes that the network names for its parameters
    (`jmp_train.flax.annotated_axes`)."""


Make = Callable[..., Any]
FirstCall = Callable[[Any], Any]


def functional(
    make: Make,
    precision: Precision,
    first_call: FirstCall = lambda net: None,
    *,
    takes_dtype: bool = False,
) -> Functional:
    """Return a network as functions.

    A network that takes a `dtype` gets those of the policy. Any other network, and every network
    under rules, is put under the policy by `jmp_train.flax.apply_policy`, or by `autocast` if it is a
    pair of functions.

    Each call gets what the method has parameters for: `train`, `training` or `is_training`;
    `deterministic`, `use_running_average` or `inference`; `rngs` (of NNX) or `key`, in training. An
    NNX module is also set by `train()` or `eval()`, and its random streams are seeded from the key
    of the step. In evaluation, the streams of both libraries are those of a constant key.

    Args:
      make: `make(dtype=, param_dtype=, rngs=)` constructs the network: an `nnx.Module`, a
        `linen.Module`, or a pair `(init, apply)` of functions.
      precision: a policy, or rules.
      first_call: `first_call(net)` calls the network with arrays of the right shapes, to initialise a
        Linen module; `net.has(method)` says whether it has a method.
      takes_dtype: whether the network computes in the `dtype` that `make` is called with.

    Raises:
      ValueError: for a rule that matches no module, for rules on a pair of functions, and for a
        network of another kind.

    >>> from jmp_train.policy.precision import get_precision
    >>> make = lambda dtype, param_dtype, rngs: nnx.BatchNorm(3, rngs=rngs)
    >>> net = functional(make, get_precision("mixed_bfloat16"))
    >>> params, state = net.init(jax.random.key(0))
    >>> out, state = net.apply(params, state, jnp.ones((2, 3)), train=True)
    >>> out.dtype, state["mean"].dtype, [f"{x:.2f}" for x in state["mean"]]
    (dtype('float32'), dtype('float32'), ['0.01', '0.01', '0.01'])
    """
    rules = precision.rules
    policy = _FLOAT32 if rules.entries else precision.model
    if not takes_dtype and not rules.entries and policy != _FLOAT32:
        rules = precision.as_rules
    make = _annotations.without_eager_sharding(make)
    build = functools.partial(make, dtype=policy.compute_dtype, param_dtype=policy.param_dtype)
    made: list[Any] = []
    # Traced, so that no parameter is computed to learn the kind of network.
    jax.eval_shape(lambda key: made.append(build(rngs=_streams(key))), jax.random.key(0))
    (network,) = made
    casts = Precision(None, rules) if rules.entries else precision
    if isinstance(network, linen.Module):
        net = _of_linen(build(rngs=_streams(jax.random.key(0))), casts, first_call)
        if precision.rules.entries:  # a module of Linen is known when it is called
            jax.eval_shape(net.init, jax.random.key(0))
        return net
    if isinstance(network, nnx.Module):
        return _of_nnx(build, casts)
    if isinstance(network, tuple) and len(network) == 2 and all(map(callable, network)):
        if precision.rules.entries:
            raise ValueError(
                "rules name the modules of a Flax network, and the model is a pair of functions; "
                "expected a policy alone"
            )
        return _of_functions(*network, casts)
    raise ValueError(
        f"the model made {_quoted(network)}; expected an nnx.Module, a linen.Module, or a pair of "
        "functions (init, apply) (docs/models.md)"
    )


def _quoted(value: Any) -> str:
    return "an array" if isinstance(value, jax.Array) else " ".join(reprlib.repr(value).split())


def _of_nnx(make: Make, precision: Precision) -> Functional:
    def build(key: jax.Array, train: bool) -> Any:
        module = make(rngs=_streams(key))
        module.train() if train else module.eval()
        rules = precision.rules
        return _nnx.apply_policy(module, rules) if rules.entries else module

    kinds = (nnx.Param, nnx.RngState, ...)
    graphs, module = {}, None
    for train in (True, False):
        module = nnx.eval_shape(functools.partial(build, train=train), jax.random.key(0))
        graphs[train], _, streams, rest = nnx.split(module, *kinds)
    has_state = bool(nnx.to_flat_state(rest))

    def init(key: jax.Array) -> Any:
        _, params, _, state = nnx.split(build(key, train=True), *kinds)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state) if has_state else None

    def apply(
        params: PyTree,
        state: PyTree,
        *args: Any,
        train: bool = False,
        key: Any = None,
        method: str = "__call__",
        **kwargs: Any,
    ) -> Any:
        seeded = _seed(streams, jax.random.key(0) if key is None else key)
        module = nnx.merge(graphs[train], params, seeded, {} if state is None else state)
        call = getattr(module, method)
        random = {"key": key, "rngs": None if key is None else nnx.Rngs(key, dropout=key)}
        out = call(*args, **_flags(call, train, random, kwargs))
        if not has_state or not train:
            return out, state
        changed = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Any(nnx.Param, nnx.RngState))))
        return out, _with_structure_of(state, changed)

    def network(params: PyTree, state: PyTree) -> Any:
        return nnx.merge(graphs[False], params, _seed(streams, jax.random.key(0)), state or {})

    # Of an instance: every class has `__call__`, that of its metaclass.
    has, annotated = lambda method: hasattr(module, method), _annotations.annotated_axes(module)
    return Functional(init, apply, has, precision, network, lambda: annotated)


def _seed(streams: Any, key: jax.Array) -> Any:
    """Return the random streams of a module, each seeded from the key and its path."""

    def seed(path: Any, x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jnp.zeros(x.shape, x.dtype)  # a count of draws
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return own if x.shape == () else jax.random.split(own, x.shape)

    return jax.tree_util.tree_map_with_path(seed, nnx.to_pure_dict(streams))


def _with_structure_of(before: PyTree, after: PyTree) -> PyTree:
    """Return the leaves of `after` at the paths of `before`: variables of one call are dropped."""
    if not isinstance(before, dict):
        return after
    return {name: _with_structure_of(value, after[name]) for name, value in before.items()}


def _of_linen(module: Any, precision: Precision, first_call: FirstCall) -> Functional:
    if precision.rules.entries:
        module = _linen.apply_policy(module, precision.rules)

    def boxed(key: jax.Array) -> Any:
        net = _FirstCall(module, key)
        with _sown.sown_paths() as sown:
            first_call(net)
        return dict(_sown.without(net.variables, sown))

    def init(key: jax.Array) -> Any:
        variables = dict(_annotations.unboxed(boxed(key)))
        params = precision.cast_to_param(variables.pop("params", {}))
        return params, variables or None

    def annotations() -> Annotations:
        return _annotations.annotated_axes(jax.eval_shape(boxed, jax.random.key(0)))

    def apply(
        params: PyTree,
        state: PyTree,
        *args: Any,
        train: bool = False,
        key: Any = None,
        method: str = "__call__",
        **kwargs: Any,
    ) -> Any:
        # Streams of other names than dropout are drawn from that of the name params.
        rngs = {"params": key, "dropout": key} if key is not None else None
        options = {"rngs": rngs if train else {"params": jax.random.key(0)}, "method": method}
        options |= _flags(getattr(module, method), train, {"key": key}, kwargs)
        variables = {"params": params, **(state or {})}
        if not train:
            with _sown.no_dropout():
                return module.apply(variables, *args, **options), state
        if not state:
            return module.apply(variables, *args, **options), state
        out, changed = module.apply(variables, *args, mutable=list(state), **options)
        return out, _with_structure_of(state, changed)

    def network(params: PyTree, state: PyTree) -> Any:
        return module, {"params": params, **(state or {})}

    has = lambda method: hasattr(module, method)
    return Functional(init, apply, has, precision, network, annotations)


class _FirstCall:
    """A Linen module that is initialised by the first call."""

    def __init__(self, module: linen.Module, key: jax.Array):
        self._module, self._streams = module, {"params": key, "dropout": key}
        self.variables: Any = {}

    def has(self, method: str) -> bool:
        return hasattr(self._module, method)

    def __call__(self, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        flags = _flags(getattr(self._module, method), False, {"key": None}, kwargs)
        out, variables = self._module.init_with_output(self._streams, *args, method=method, **flags)
        self.variables = self.variables or variables
        return out


def _of_functions(first: Function, call: Function, precision: Precision) -> Functional:
    policy = precision.model

    def init(key: jax.Array) -> Any:
        return cast_floating(first(key), policy.param_dtype), None

    def apply(
        params: PyTree,
        state: PyTree,
        *args: Any,
        train: bool = False,
        key: Any = None,
        method: str = "__call__",
        **kwargs: Any,
    ) -> Any:
        del method
        run = functools.partial(call, **_flags(call, train, {"key": key}, kwargs))
        if precision.rules.entries:
            run = autocast(run, policy.compute_dtype)
        return run(params, *args), state

    def network(params: PyTree, state: PyTree) -> Any:
        del state
        return call, params

    return Functional(init, apply, lambda method: method == "__call__", precision, network)


def _flags(
    method: Function, train: bool, random: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
    """Return the keyword arguments of a call: the given ones, and the flags that the method takes."""
    flags = dict.fromkeys(_IN_TRAINING, train) | dict.fromkeys(_IN_EVALUATION, not train)
    flags |= random if train else dict.fromkeys(random)
    try:
        takes = inspect.signature(method).parameters
    except (TypeError, ValueError):
        takes = {}
    return {name: value for name, value in flags.items() if name in takes} | given


def _streams(key: jax.Array) -> nnx.Rngs:
    """Random streams of a construction: parameters from the key, others from one derived from it."""
    return nnx.Rngs(jax.random.fold_in(key, 0), params=key)
