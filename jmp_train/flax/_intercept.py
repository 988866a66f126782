"""Interception of the method calls of marked NNX modules, without a change of class or identity.

Model code may compare `type(child)` with a class, or `type(self).fused` with `Base.fused`. A marked
module must therefore keep its class, and a method must be the same object in a class and in its
subclasses. Linen has `intercept_methods` for this. NNX has no such function, and Python looks up
`__call__` on the class only. Each method is therefore replaced, in the class that defines it, by a
function that looks for a region in the instance. An instance without a region runs the author's
method, in every thread. Classes of the standard library are not changed. If two names refer to one
method, they refer to one replacement.

A method is not restored after a call, because JAX traces the rules of a custom derivative, and the
modules that they call, after the call has returned.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import sys
import threading
import weakref
from typing import Any

from flax import nnx

from jmp_train.flax import _region
from jmp_train.types import Function

# As an attribute of the module, the region is preserved by split, merge, scan and remat. NNX does
# not list attributes with this prefix (nnx.Dict, the bridge).
_REGION = "_pytree__jmp_train_region"
_MARK = "_jmp_train_replacement"

_LEFT_ALONE = frozenset(nnx.Module.__mro__) | {nnx.List, nnx.Dict}  # they compute nothing
_RESERVED = frozenset(name for base in nnx.Module.__mro__ for name in vars(base))
_running: contextvars.ContextVar[Any] = contextvars.ContextVar("running module", default=None)
_lock = threading.Lock()
# By the author's function, so that two names of a method have one replacement.
_replacements: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def mark(module: nnx.Module, region: _region.ModuleRegion) -> None:
    """Make the methods of a module run in a region from now on."""
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
    """Return whether an attribute of a class is a public method that nnx.Module does not define."""
    public = name == "__call__" or not name.startswith("_")
    return public and name not in _RESERVED and inspect.isfunction(method)


def _in_own_region(method: Function) -> Function:
    """Return a method that runs in its module's region, unless that module itself calls it."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # A function of a class may be called without a module.
        module = args[0] if args else None
        region = vars(module).get(_REGION) if isinstance(module, nnx.Module) else None
        if region is None or _running.get() is module:  # calls of super() and self.method()
            return method(*args, **kwargs)
        token = _running.set(module)
        try:
            return _region.run(region, functools.partial(method, module), args[1:], kwargs)
        finally:
            _running.reset(token)

    setattr(wrapped, _MARK, True)
    return wrapped
