"""Intercepts the method calls of marked NNX modules, while every class and method keeps its identity.

Model code may compare `type(child)` with a class, or `type(self).fused` with `Base.fused`. So a
marked module must be of its own class, and a method must be one object in a class and in those
that inherit it. Linen has `intercept_methods` for this; NNX has nothing, and Python finds
`__call__` on the class alone. Therefore each method is replaced where it is defined by a function
that asks the instance for its region: an instance without one, in any thread, runs the author's
method as before. Classes of the standard library are left alone, and two names of one method stay one.

A method stays replaced. To restore it after a call would be too early: JAX traces the rules of a
custom derivative, and the modules that they call, when the call is over.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from flax import nnx

from jmp_train.flax import _region

# In a module's attributes the region follows it through split, merge, scan and remat. NNX keeps
# names with this prefix to itself where it lists the attributes of a module (nnx.Dict, the bridge).
_REGION = "_pytree__jmp_train_region"
_MARK = "_jmp_train_replacement"

_LEFT_ALONE = frozenset(nnx.Module.__mro__) | {nnx.List, nnx.Dict}  # they compute nothing
_RESERVED = frozenset(name for base in nnx.Module.__mro__ for name in vars(base))
_running: contextvars.ContextVar[Any] = contextvars.ContextVar("running module", default=None)
_lock = threading.Lock()
# By the author's function: its two names, if it has two, get one replacement.
_replacements: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def mark(module: nnx.Module, region: _region.ModuleRegion) -> None:
    """Makes the methods of a module run in a region from now on."""
    object.__setattr__(module, _REGION, region)
    for owner in type(module).__mro__:
        if owner in _LEFT_ALONE or owner.__module__.partition(".")[0] in sys.stdlib_module_names:
            continue
        for name, method in list(vars(owner).items()):
            if is_public(name, method) and not hasattr(method, _MARK):
                with _lock:
                    if method not in _replacements:
                        _replacements[method] = _in_own_region(method)
                    setattr(owner, name, _replacements[method])


def is_public(name: str, method: Any) -> bool:
    """Whether an attribute of a class is a method that a caller may call, nnx.Module's own apart."""
    public = name == "__call__" or not name.startswith("_")
    return public and name not in _RESERVED and inspect.isfunction(method)


def _in_own_region(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that runs in its module's region, unless that module itself calls it."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # A function of a class need not be called on a module.
        module = args[0] if args else None
        region = vars(module).get(_REGION) if isinstance(module, nnx.Module) else None
        if region is None or _running.get() is module:  # super() and self.method() stay inside
            return method(*args, **kwargs)
        token = _running.set(module)
        try:
            return _region.run(region, functools.partial(method, module), args[1:], kwargs)
        finally:
            _running.reset(token)

    setattr(wrapped, _MARK, True)
    return wrapped
