"""Rules on an NNX model: its methods run under autocast, each module in a name scope."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

import jax
from flax import nnx

from jmp_train._autocast.transform import autocast
from jmp_train.flax import _intercept, _region
from jmp_train.policy.rules import Rules
from jmp_train.tree import cast_floating, widen_to_full
from jmp_train.types import Function, PyTree

M = TypeVar("M", bound=nnx.Module)

#: Attribute of a class under rules that has the author's class.
_WRITTEN = "_jmp_train_written"


def modules_of(module: nnx.Module) -> dict[str, str]:
    """Return the type of each module by its path, the model itself first."""
    found = {"/".join(map(str, path)): type(m).__name__ for path, m in nnx.iter_modules(module)}
    return dict(sorted(found.items(), key=lambda item: item[0].split("/") if item[0] else []))


def apply_policy(module: M, rules: Rules) -> M:
    """See `jmp_train.flax.apply_policy`."""
    rules.check(modules_of(module))
    module = nnx.clone(module)
    for path, inner in nnx.iter_modules(module):
        _restore_class(inner)
        dtype = rules.policy_of("/".join(map(str, path))).param_dtype
        for value in vars(inner).values():
            if isinstance(value, nnx.Param):
                value[...] = value[...]  # a separate reference
                value.set_value(cast_floating(value.get_value(), dtype))
    module.__class__ = _under_rules(type(module), rules)
    return module


def _restore_class(module: nnx.Module) -> None:
    """Restore the author's class of a module that is under rules.

    The policy that was applied last therefore replaces earlier ones, on the model or on a part.
    """
    module.__class__ = vars(type(module)).get(_WRITTEN, type(module))


def _public_methods(kind: type) -> dict[str, Function]:
    """Return the public methods of a class, including inherited ones."""
    found = ((name, inspect.getattr_static(kind, name)) for name in dir(kind))
    return {name: method for name, method in found if _intercept.is_public(name, method)}


@functools.cache
def _under_rules(kind: type, rules: Rules) -> type:
    """Return a subclass whose public methods run the model under rules.

    The rules are stored in the class, because the fields of a module are its state, which is saved.
    """

    def wrap(name: str, method: Function) -> Function:
        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _run(self, rules, name, args, kwargs)

        return wrapped

    methods = {name: wrap(name, method) for name, method in _public_methods(kind).items()}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, _WRITTEN: kind, **methods})


def _run(model: Any, rules: Rules, name: str, args: PyTree, kwargs: PyTree) -> Any:
    """Call a method as a pure function of the model's state under autocast; update the state."""
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_object)
    objects = [leaf for leaf in leaves if _is_object(leaf)]
    rest = [None if _is_object(leaf) else leaf for leaf in leaves]
    graph, params, state = nnx.split((model, objects), nnx.Param, ...)

    def pure(params: PyTree, state: PyTree, rest: Any) -> Any:
        inner, objects = nnx.merge(graph, params, state, copy=True)
        _mark(inner, rules)
        given = iter(objects)
        full = [
            next(given) if _is_object(old) else new for old, new in zip(leaves, rest, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(tree, full)
        out = getattr(inner, name)(*args, **kwargs)
        return out, _changed(state, nnx.state((inner, objects), nnx.Not(nnx.Param)))

    # The regions set the dtypes; autocast's compute dtype applies outside all regions.
    out, state = autocast(pure, "float32")(widen_to_full(params), state, rest)
    nnx.update((model, objects), state)
    return rules.policy_of("").cast_to_output(out)


def _changed(before: Any, after: Any) -> Any:
    """Return the variables that a call wrote to; Flax forbids any write to some others."""
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
    """Set the region of each module of a model, which is a copy for this call."""
    for path, module in nnx.iter_modules(model):
        _restore_class(module)  # a part may be replaced after the rules were applied
        _intercept.mark(module, _region.region_of(rules, "/".join(map(str, path))))
        if _region.is_half(vars(module).get("dtype")):
            setattr(module, "dtype", None)  # noqa: B010  (a Module need not have one)
