"""What modules of Linen sow and draw: two methods of `linen.Module` that say so to whoever listens.

From the outside, a sown value is a variable like any other, and a network that draws for dropout is
like one that draws a sample. `nn.intercept_methods` does not see these two methods. They are therefore
replaced once, by functions that call Flax's own, in every thread.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from flax import errors, linen

from jmp_train.types import PyTree

Path = tuple[str, ...]
_sown: contextvars.ContextVar[set[Path] | None] = contextvars.ContextVar("sown", default=None)
_fixed: contextvars.ContextVar[bool] = contextvars.ContextVar("fixed streams", default=False)
_lock = threading.Lock()
_MARK = "_jmp_train"


@contextlib.contextmanager
def sown_paths() -> Iterator[set[Path]]:
    """Collect the paths of the values that are sown in the context: collection, modules, name."""
    _install()
    found: set[Path] = set()
    token = _sown.set(found)
    try:
        yield found
    finally:
        _sown.reset(token)


@contextlib.contextmanager
def no_dropout() -> Iterator[None]:
    """Raise flax.errors.InvalidRngError in the context where a module draws for dropout.

    Flax does so itself if there is no stream of any name.
    """
    _install()
    token = _fixed.set(True)
    try:
        yield
    finally:
        _fixed.reset(token)


def without(tree: PyTree, paths: set[Path]) -> Any:
    """Return nested dicts without the values at some paths, and without dicts that this empties."""
    if not isinstance(tree, Mapping) or not paths:
        return tree
    kept = {}
    for name, value in tree.items():
        below = {path[1:] for path in paths if path[0] == name}
        if () in below:
            continue
        inner = without(value, below)
        if not below or inner:
            kept[name] = inner
    return kept


def _install() -> None:
    with _lock:
        if getattr(linen.Module.sow, _MARK, False):
            return
        sow, make_rng = linen.Module.sow, linen.Module.make_rng

        @functools.wraps(sow)
        def sow_and_say(self: Any, col: str, name: str, *args: Any, **kwargs: Any) -> bool:
            sown = _sown.get()
            if sown is not None and self.scope is not None:
                sown.add((col, *self.scope.path, name))
            return sow(self, col, name, *args, **kwargs)

        @functools.wraps(make_rng)
        def make_rng_but_for_dropout(self: Any, name: str = "params") -> Any:
            dropout = name == "dropout" or isinstance(self, linen.Dropout)
            if dropout and _fixed.get() and not self.has_rng(name):
                raise errors.InvalidRngError(f'{self.name} needs PRNG for "{name}"')
            return make_rng(self, name)

        setattr(sow_and_say, _MARK, True)
        linen.Module.sow = sow_and_say
        linen.Module.make_rng = make_rng_but_for_dropout
