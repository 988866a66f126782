"""Rules on an object that carries a Linen module, such as a Flax model of Hugging Face."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from flax import linen, nnx

from jmp_train.flax import _linen
from jmp_train.policy.rules import Rules

W = TypeVar("W")


def carries_module(wrapper: Any) -> bool:
    """Whether an object that is no Flax module itself has a Linen module as its `module`."""
    if isinstance(wrapper, (nnx.Module, linen.Module)):
        return False
    return isinstance(getattr(wrapper, "module", None), linen.Module)


def apply_policy(wrapper: W, rules: Rules) -> W:
    """A shallow copy whose module follows the rules and whose `params`, if it has any, are cast."""
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


def _cast(params: Any, rules: Rules) -> Any:
    """The wrapper's parameters, which stand alone or beside other collections."""
    if "params" in params:
        return _linen.cast_params(params, rules)
    return _linen.cast_params({"params": params}, rules)["params"]
