"""Rules on an object with a Linen module as attribute, such as a Flax model of Hugging Face."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from flax import linen, nnx

from jmp_train.flax import _linen
from jmp_train.policy.rules import Rules
from jmp_train.types import PyTree

W = TypeVar("W")


def carries_module(wrapper: Any) -> bool:
    """Return whether an object is not a Flax module and its `module` is a Linen module."""
    if isinstance(wrapper, (nnx.Module, linen.Module)):
        return False
    return isinstance(getattr(wrapper, "module", None), linen.Module)


def apply_policy(wrapper: W, rules: Rules) -> W:
    """Return a shallow copy with its module under the rules and its `params`, if any, cast."""
    under: Any = copy.copy(wrapper)
    module = under.module
    names = [name for name, value in getattr(under, "__dict__", {}).items() if value is module]
    params = getattr(under, "params", None)
    try:
        for name in names:
            setattr(under, name, _linen.apply_policy(module, rules))
        if params is not None:
            under.params = _cast(params, rules)
    except AttributeError:  # read-only, as in a frozen dataclass
        names = []
    if not names:
        raise TypeError(
            f"apply_policy found no attribute of {type(wrapper).__name__} where its module and its "
            "params can be replaced; use apply_policy(model.module, rules) and call that"
        )
    return under


def _cast(params: PyTree, rules: Rules) -> Any:
    """Cast the wrapper's parameters, which may be one of several collections."""
    if "params" in params:
        return _linen.cast_params(params, rules)
    return _linen.cast_params({"params": params}, rules)["params"]
