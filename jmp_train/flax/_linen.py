"""Rules on a Linen model: `init` and `apply` run under autocast, each module in a name scope."""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import jax
from flax import linen as nn

from jmp_train._autocast.transform import autocast
from jmp_train.flax import _region
from jmp_train.policy.rules import Rules
from jmp_train.tree import cast_floating, widen_to_full
from jmp_train.types import Function, PyTree

M = TypeVar("M", bound=nn.Module)

# The author's class for each class under rules, so that a second policy replaces the first.
_UNDER: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()


def modules_of(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Return the type of each module that a call uses by its path, the model itself first."""
    found: dict[str, str] = {}

    def note(run_next: Function, args: PyTree, kwargs: PyTree, context: Any) -> Any:
        path = "/".join(context.module.path)
        found.setdefault(path, type(context.module).__name__)
        return run_next(*args, **kwargs)

    rngs = {name: jax.random.key(0) for name in ("params", "dropout", "default")}
    with nn.intercept_methods(note):
        jax.eval_shape(functools.partial(module.init, rngs, **kwargs), *args)
    return dict(sorted(found.items(), key=lambda item: item[0].split("/") if item[0] else []))


def apply_policy(module: M, rules: Rules) -> M:
    """See `jmp_train.flax.apply_policy`."""
    return _as(_under_rules(_UNDER.get(type(module), type(module)), rules), module)


def _as(kind: Callable[..., M], module: nn.Module) -> M:
    """Return the module as one of another class, without a call of its `__post_init__`.

    That may change a field (`self.width *= 2`), and has done so already.
    """
    same = copy.copy(module)
    object.__setattr__(same, "__class__", kind)
    return cast(M, same)


@functools.lru_cache(maxsize=256)
def _under_rules(kind: type, rules: Rules) -> type:
    """Return a subclass whose `init` and `apply` run a module of the class under the rules."""

    def apply(self: Any, variables: PyTree, *args: Any, rngs: PyTree = None, **options: Any) -> Any:
        mutable = options.get("mutable", False)

        def pure(variables: PyTree, args: PyTree, rngs: PyTree, options: Any) -> Any:
            with _regions(rules) as seen:
                out = _as(kind, self).apply(variables, *args, rngs=rngs, **options)
            seen |= _paths_of(variables.get("params", {}))
            rules.check(seen)
            return out

        variables = {**variables, "params": widen_to_full(variables.get("params", {}))}
        # The regions set the dtypes; autocast's compute dtype applies outside all regions.
        out = autocast(pure, "float32")(variables, args, rngs, options)
        cast = rules.policy_of("").cast_to_output
        return (cast(out[0]), *out[1:]) if mutable is not False else cast(out)

    def init(self: Any, rngs: PyTree, *args: Any, **options: Any) -> Any:
        with _regions(rules) as seen:
            _, variables = _as(kind, self).init_with_output(rngs, *args, **options)
        rules.check(seen)
        return cast_params(variables, rules)

    def init_with_output(self: Any, rngs: PyTree, *args: Any, **options: Any) -> Any:
        variables = self.init(rngs, *args, **options)
        return self.apply(variables, *args, rngs=rngs, **options), variables

    under = type(kind.__name__, (kind,), {"__module__": kind.__module__})
    methods: list[Any] = [apply, init, init_with_output]
    _UNDER[under] = kind
    for method in methods:  # set later: Linen wraps the methods of a new class
        name = method.__name__
        setattr(under, name, functools.update_wrapper(method, getattr(kind, name)))
    return under


@contextlib.contextmanager
def _regions(rules: Rules) -> Iterator[set[str]]:
    """Run the methods of each module in its region, and collect the paths of called modules."""
    seen: set[str] = set()

    def enter(run_next: Function, args: PyTree, kwargs: PyTree, context: Any) -> Any:
        module, path = context.module, "/".join(context.module.path)
        seen.add(path)
        name = context.method_name
        if name == "setup" or (name.startswith("_") and name != "__call__"):
            return run_next(*args, **kwargs)
        own = vars(module).get("dtype")
        if not _region.is_half(own):
            return _region.run(_region.region_of(rules, path), run_next, args, kwargs)
        object.__setattr__(module, "dtype", None)  # the module is a copy for this call
        try:
            return _region.run(_region.region_of(rules, path), run_next, args, kwargs)
        finally:
            object.__setattr__(module, "dtype", own)

    with nn.intercept_methods(enter):
        yield seen


def cast_params(variables: PyTree, rules: Rules) -> Any:
    """Cast each parameter to the parameter dtype of its module."""

    def cast(path: Any, x: Any) -> Any:
        if path and isinstance(path[-1], jax.tree_util.GetAttrKey):  # in a box of Linen's metadata
            path = path[:-1]
        owner = "/".join(str(key.key) for key in path[:-1] if hasattr(key, "key"))
        return cast_floating(x, rules.policy_of(owner).param_dtype)

    params = jax.tree_util.tree_map_with_path(cast, variables.get("params", {}))
    return {**variables, "params": params} if "params" in variables else variables


def _paths_of(params: PyTree, prefix: str = "") -> set[str]:
    """Return the paths of the modules that have parameters."""
    found = {prefix}
    for name, value in params.items():
        if isinstance(value, Mapping):
            found |= _paths_of(value, f"{prefix}/{name}" if prefix else name)
    return found
