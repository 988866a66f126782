"""Intercepts the method calls of marked NNX modules, while every class and method keeps its identity.

Model code may compare `type(child)` with a class, or `type(self).fused` with `Base.fused`. So a
marked module must be of its own class, and a method must be one object in a class and in those
that inherit it. Linen has `intercept_methods` for this; NNX has nothing, and Python finds
`__call__` on the class alone. Therefore each method is replaced where it is defined by a function
that asks the instance for its region: an instance without one, in any thread, runs the author's
method as before.

A class is replaced once and stays so. To restore it after a call would be too early: JAX traces the
rules of a custom derivative, and the modules that they call, when the call is over.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

from flax import nnx

from jmp_train.flax import _region

# In a module's attributes the region follows it through split, merge, scan and remat. NNX keeps
# names with this prefix to itself where it lists the attributes of a module (nnx.Dict, the bridge).
_REGION = "_pytree__jmp_train_region"

_NNX = frozenset(nnx.Module.__mro__)
_RESERVED = frozenset(name for base in _NNX for name in vars(base))
_running: contextvars.ContextVar[Any] = contextvars.ContextVar("running module", default=None)
_lock = threading.Lock()
_replaced: set[type] = set()


def mark(module: nnx.Module, region: _region.Region) -> None:
    """Makes the methods of a module run in a region from now on."""
    object.__setattr__(module, _REGION, region)
    with _lock:
        for owner in set(type(module).__mro__) - _NNX - _replaced:
            for name, method in list(vars(owner).items()):
                if is_public(name, method):
                    setattr(owner, name, _in_own_region(method))
            _replaced.add(owner)


def is_public(name: str, method: Any) -> bool:
    """Whether an attribute of a class is a method that a caller may call, nnx.Module's own apart."""
    public = name == "__call__" or not name.startswith("_")
    return public and name not in _RESERVED and inspect.isfunction(method)


def _in_own_region(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that runs in its module's region, unless that module itself calls it."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        region = getattr(self, "__dict__", {}).get(_REGION)
        if region is None or _running.get() is self:  # super() and self.method() stay inside
            return method(self, *args, **kwargs)
        token = _running.set(self)
        try:
            return _region.run(region, functools.partial(method, self), args, kwargs)
        finally:
            _running.reset(token)

    return wrapped
