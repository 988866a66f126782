"""Rules on an NNX model: its methods run under autocast, each module in a scope of its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

from jmp_train._autocast.transform import autocast
from jmp_train.flax import _intercept, _region
from jmp_train.policy.rules import Rules
from jmp_train.tree import cast_floating, widen_to_full

M = TypeVar("M", bound=nnx.Module)

#: In a class under rules: the class that the author wrote.
_WRITTEN = "_jmp_train_written"


def modules_of(module: nnx.Module) -> dict[str, str]:
    """The type of every module by its path, the model itself first."""
    found = {"/".join(map(str, path)): type(m).__name__ for path, m in nnx.iter_modules(module)}
    return dict(sorted(found.items(), key=lambda item: item[0].split("/") if item[0] else []))


def apply_policy(module: M, rules: Rules) -> M:
    """See `jmp_train.flax.apply_policy`."""
    rules.check(modules_of(module))
    module = nnx.clone(module)
    for path, inner in nnx.iter_modules(module):
        _take_off(inner)
        dtype = rules.policy_of("/".join(map(str, path))).param_dtype
        for value in vars(inner).values():
            if isinstance(value, nnx.Param):
                value[...] = value[...]  # a reference of its own
                value.set_value(cast_floating(value.get_value(), dtype))
    module.__class__ = _under_rules(type(module), rules)
    return module


def _take_off(module: nnx.Module) -> None:
    """Gives a module that is under rules of its own the class that its author wrote: of two policies
    on one model the one applied last holds, and that of the whole model over that of a part."""
    module.__class__ = vars(type(module)).get(_WRITTEN, type(module))


def _public_methods(kind: type) -> dict[str, Callable[..., Any]]:
    """The methods of a class that a caller may call, inherited ones too."""
    found = ((name, inspect.getattr_static(kind, name)) for name in dir(kind))
    return {name: method for name, method in found if _intercept.is_public(name, method)}


@functools.cache
def _under_rules(kind: type, rules: Rules) -> type:
    """A subclass whose public methods run the model under its rules.

    The rules lie in the class, not in the module: fields of a module are its state and checkpoints.
    """

    def wrap(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _run(self, rules, name, args, kwargs)

        return wrapped

    methods = {name: wrap(name, method) for name, method in _public_methods(kind).items()}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, _WRITTEN: kind, **methods})


def _run(model: Any, rules: Rules, name: str, args: Any, kwargs: Any) -> Any:
    """One call of the model: pure in its state, traced, recast, its new state written back."""
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_object)
    objects = [leaf for leaf in leaves if _is_object(leaf)]
    rest = [None if _is_object(leaf) else leaf for leaf in leaves]
    graph, params, state = nnx.split((model, objects), nnx.Param, ...)

    def pure(params: Any, state: Any, rest: Any) -> Any:
        inner, objects = nnx.merge(graph, params, state, copy=True)
        _mark(inner, rules)
        given = iter(objects)
        full = [
            next(given) if _is_object(old) else new for old, new in zip(leaves, rest, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(tree, full)
        out = getattr(inner, name)(*args, **kwargs)
        return out, _changed(state, nnx.state((inner, objects), nnx.Not(nnx.Param)))

    # The policy's own dtypes decide; autocast's compute dtype is for what no region covers.
    out, state = autocast(pure, "float32")(widen_to_full(params), state, rest)
    nnx.update((model, objects), state)
    return rules.policy_of("").cast_to_output(out)


def _changed(before: Any, after: Any) -> Any:
    """The variables that a call wrote to; Flax refuses to write to some even what they hold."""
    old = {path: variable.get_raw_value() for path, variable in nnx.to_flat_state(before)}
    written = [
        (path, variable)
        for path, variable in nnx.to_flat_state(after)
        if path not in old or variable.get_raw_value() is not old[path]
    ]
    return nnx.from_flat_state(written)


def _is_object(x: Any) -> bool:
    return isinstance(x, (nnx.Module, nnx.Rngs, nnx.RngStream))


def _mark(model: nnx.Module, rules: Rules) -> None:
    """Gives every module of a model, which is this call's own, its region."""
    for path, module in nnx.iter_modules(model):
        _take_off(module)  # of a part that was put in after the rules
        _intercept.mark(module, _region.region_of(rules, "/".join(map(str, path))))
        if _region.gives_way(vars(module).get("dtype")):
            setattr(module, "dtype", None)  # noqa: B010  (a Module need not have one)
