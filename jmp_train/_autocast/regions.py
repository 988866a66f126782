"""Regions: stretches of code with a dtype of their own under `autocast`.

A name scope marks a region, because every transformation of JAX carries name scopes along: `jit`,
`grad`, `vmap` and `scan` keep them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train._autocast.kinds import FLOAT32, parse_compute_dtype
from jmp_train._jaxpr.compat import Equation

_PRECISION = "with_precision."
_COMPUTE = "compute_in."
_INNER = "autocast."
_STORED = "stored_as."
#: What the name of a scope that this module makes begins with.
SCOPES = (_PRECISION, _COMPUTE, _INNER, _STORED)


def module_path(stack: str) -> str:
    """Return the path of a module in a name stack, "" where the stack has none.

    The scopes of transformations, of recomputation and of regions are left out.

    >>> module_path("transpose(jvp(Net))/compute_in.bfloat16/checkpoint/Dense_0")
    'Net/Dense_0'
    """
    scope: list[str] = []
    for name in re.sub(r"[\w<>]+\(|\)", "", stack).split("/"):
        ours = name.startswith(SCOPES)
        if name and not ours and name not in ("checkpoint", "rematted_computation", *scope[-1:]):
            scope.append(name)
    return "/".join(scope)


class MarkedRegion(NamedTuple):
    """The region that an equation was written in.

    Attributes:
      dtype: the dtype of the region.
      lists: whether it is the dtype of the compute rule, with the other rules as outside; else
        everything that was written in float32 runs in it.
    """

    dtype: np.dtype
    lists: bool


def region_of(eqn: Equation, outer: MarkedRegion | None) -> MarkedRegion | None:
    """Return the innermost region that an equation was written in, `outer` where none."""
    return _region_in(str(eqn.source_info.name_stack)) or outer


@functools.lru_cache(maxsize=4096)
def _region_in(stack: str) -> MarkedRegion | None:
    last, mark = max((stack.rfind(mark), mark) for mark in (_PRECISION, _COMPUTE, _INNER))
    if last < 0:
        return None
    if mark == _INNER:
        return MarkedRegion(FLOAT32, lists=False)
    word = "".join(c if c.isalnum() or c == "_" else " " for c in stack[last + len(mark) :])
    return MarkedRegion(np.dtype(getattr(jnp, word.split()[0])), lists=mark == _COMPUTE)


def is_stored_as(eqn: Equation) -> bool:
    """Return whether a cast is one of `store_as`."""
    return _STORED in str(eqn.source_info.name_stack)


def inner_name(dtype: np.dtype) -> str:
    """Return the scope name of an autocast; an outer autocast leaves what is inside alone."""
    return f"{_INNER}{dtype.name}"


class RegionMark(contextlib.ContextDecorator):
    """Mark code as a region, as a context manager or a decorator; a new one for each use."""

    def __init__(self, name: str):
        self.name = name
        self._scopes: list[contextlib.ExitStack] = []

    def _recreate_cm(self) -> RegionMark:
        return RegionMark(self.name)

    def __enter__(self) -> Self:
        scope = contextlib.ExitStack()
        scope.enter_context(jax.named_scope(self.name))
        self._scopes.append(scope)
        return self

    def __exit__(self, *error: object) -> None:
        self._scopes.pop().close()


def with_precision(dtype: Any = "float32") -> RegionMark:
    """Mark code that `autocast` runs in another dtype; without autocast the mark changes nothing.

    What was written in float32 inside runs in `dtype`: with `"float32"` the region is left alone.
    The result is a function decorator and a context manager. The mark is a name scope, which every
    transformation of JAX carries along, so it applies under `jit`, `grad`, `vmap` and `scan`, and
    to the backward pass of the marked code; profilers show it. Of nested regions the innermost
    applies.

    Args:
      dtype: `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
      ValueError: for another dtype.
      TypeError: for a function in place of the dtype: `@with_precision` without a call.

    >>> import jax.numpy as jnp
    >>> @with_precision("float32")
    ... def solve(a, b):
    ...     return a @ b
    >>> from jmp_train import autocast
    >>> jaxpr = jax.make_jaxpr(autocast(lambda a: solve(a, a) @ a))(jnp.ones((2, 2)))
    >>> [str(e.outvars[0].aval) for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    ['float32[2,2]', 'bfloat16[2,2]']
    """
    if inspect.isroutine(dtype):
        raise TypeError(
            f"with_precision expects a dtype; write @with_precision('float32'), not {dtype!r}"
        )
    return RegionMark(f"{_PRECISION}{parse_compute_dtype(dtype).name}")


def compute_in(dtype: Any) -> RegionMark:
    """Mark code with another compute dtype under `autocast`; without autocast it changes nothing.

    The lists of operations apply inside as outside: contractions run in `dtype`, delicate
    operations in float32. (`with_precision` gives everything inside one dtype.) The result is a
    function decorator and a context manager; of nested marks the innermost applies.

    Args:
      dtype: `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
      ValueError: for another dtype.

    >>> import jax.numpy as jnp
    >>> def model(x):
    ...     x = x @ x
    ...     with compute_in("float16"):
    ...         return jnp.exp(x @ x)
    >>> from jmp_train import autocast
    >>> jaxpr = jax.make_jaxpr(autocast(model, "bfloat16"))(jnp.ones((2, 2)))
    >>> [(e.primitive.name, e.outvars[0].aval.dtype.name) for e in jaxpr.eqns
    ...  if e.primitive.name in ("dot_general", "exp")]
    [('dot_general', 'bfloat16'), ('dot_general', 'float16'), ('exp', 'float32')]
    """
    return RegionMark(f"{_COMPUTE}{parse_compute_dtype(dtype).name}")


def store_as(x: jax.Array, dtype: Any) -> jax.Array:
    """Store a float32 array in another dtype under `autocast`, while the code still sees float32.

    Later operations read it as if an operation had run in `dtype`: a sum of two arrays stored in
    bfloat16 is formed in bfloat16, and it takes half the memory. Without autocast it is only
    rounded to `dtype`, which XLA may leave out. An array that is not float32 is returned
    unchanged.

    Args:
      x: any array.
      dtype: `"float32"` (which takes a half-precision one back to float32), `"bfloat16"` or
        `"float16"`.

    >>> import jax.numpy as jnp
    >>> from jmp_train import autocast
    >>> jaxpr = jax.make_jaxpr(autocast(lambda x: jnp.sin(store_as(x, "bfloat16"))))(jnp.ones(2))
    >>> [(e.primitive.name, e.outvars[0].aval.dtype.name) for e in jaxpr.eqns][:2]
    [('convert_element_type', 'bfloat16'), ('sin', 'bfloat16')]
    """
    dtype = parse_compute_dtype(dtype)
    if x.dtype != np.float32:
        return x
    with jax.named_scope(f"{_STORED}{dtype.name}"):
        if dtype == np.float32:
            return jax.lax.reduce_precision(x, 8, 23)  # in no list: its operand is float32
        return x.astype(dtype).astype(np.float32)
