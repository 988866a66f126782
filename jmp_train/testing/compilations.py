"""An assertion that a function compiles once, and what made it compile again."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from jmp_train.testing.operations import report
from jmp_train.tree import path_name
from jmp_train.types import Function, PyTree

# JAX records it at each compilation, also of a program in the persistent cache.
_COMPILED = "/jax/core/compile/backend_compile_duration"


@contextmanager
def assert_one_compilation(fn: Function) -> Iterator[Function]:
    """Assert that calls of a function compile it at most once: nothing after the first call.

    Yields the function to call in its place, so that a state can be passed from call to call:

        with assert_one_compilation(stepper.step) as step:
            for batch in batches:
                state, info = step(state, batch)

    Compilations are those that JAX records in the calling thread while the function runs, so the
    function may be jitted, a `Stepper`'s step, or Python code around jitted functions. A call that
    raises an error counts if it compiled something before.

    Args:
      fn: the function.

    Raises:
      AssertionError: if a call after the first compiled; it names each argument whose structure,
        shape, dtype, weak type, sharding or static value differs from the call before. Also if the
        function was called less than twice, because then there was nothing to check.
      TypeError: if `fn` is not callable.

    >>> import jax.numpy as jnp
    >>> with assert_one_compilation(jax.jit(jnp.sin)) as sin:
    ...     _ = sin(jnp.ones(3)), sin(jnp.zeros(3))
    """
    if not callable(fn):
        raise TypeError(f"expected a function, got {type(fn).__name__}")
    _check_recorded()
    calls = _Calls(fn)
    yield calls
    calls.check()


@functools.cache
def _check_recorded() -> None:
    """Raise a RuntimeError if this JAX records compilations in another manner, unseen by us."""
    with _compilations() as compiled:
        jax.jit(lambda: 0).lower().compile()  # `disable_jit` turns calls off
    if not compiled:
        raise RuntimeError(f"jax {jax.__version__} does not record {_COMPILED}, which is counted")


class _Call(NamedTuple):
    """A call: types and values of its arguments, and the functions that it compiled."""

    types: dict[str, str]
    values: dict[str, str]
    compiled: list[str]


class _Calls:
    """A function that notes what each of its calls compiles."""

    def __init__(self, fn: Function):
        self._fn = fn
        self._calls: list[_Call] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        types, values = _describe(self._fn, args, kwargs)  # before the call, which may donate them
        returned = False
        with _compilations() as compiled:
            try:
                out = self._fn(*args, **kwargs)
                returned = True
            finally:
                if returned or compiled:
                    self._calls.append(_Call(types, values, compiled))
        return out

    def check(self) -> None:
        if len(self._calls) < 2:
            count = len(self._calls)
            raise AssertionError(
                f"assert_one_compilation failed: expected at least 2 calls, found {count}"
            )
        found: list[str] = []
        for i, (before, call) in enumerate(zip(self._calls, self._calls[1:], strict=False), 2):
            if call.compiled:
                found.append(f"call {i} compiled {', '.join(dict.fromkeys(call.compiled))}")
                found += [f"  {line}" for line in _changes(before, call)]
        if found:
            again = sum(bool(call.compiled) for call in self._calls[1:])
            some = f"{again} in {len(self._calls)} calls"
            raise report(
                "assert_one_compilation", "no compilation after the first call", some, found
            )


@contextmanager
def _compilations() -> Iterator[list[str]]:
    """Yield the names of the functions that JAX compiles in the scope and its thread."""
    found: list[str] = []
    thread = threading.get_ident()

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED and threading.get_ident() == thread:  # JAX calls it where it compiles
            found.append(str(kwargs.get("fun_name", "a function")))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def _describe(
    fn: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return what a compiled program depends on, by the paths of the arguments' leaves.

    First the types of arrays and the structure; then values, which matter for static arguments.
    """
    try:
        arguments: PyTree = dict(inspect.signature(fn).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):  # no signature, or a call that fails by itself
        arguments = {"args": args, "kwargs": kwargs}
    types, values = {}, {}
    for path, x in jax.tree_util.tree_leaves_with_path(arguments):
        is_array = isinstance(x, (jax.Array, np.ndarray, np.generic))
        types[path_name(path)] = _describe_array(x) if is_array else type(x).__name__
        if not is_array:
            values[path_name(path)] = repr(x)
    types["by keyword"] = str(sorted(kwargs))
    types["structure"] = str(jax.tree.structure(arguments))
    return types, values


def _describe_array(x: Any) -> str:
    words = [f"{x.dtype}[{','.join(map(str, x.shape))}]"]
    if isinstance(x, jax.Array):
        words += ["weakly typed"] * getattr(x, "weak_type", False)  # keys have none
        words += [
            f"on {x.sharding}",
            "committed" if getattr(x, "committed", True) else "uncommitted",
        ]
    return ", ".join(words)


def _changes(before: _Call, now: _Call) -> list[str]:
    """Return a line for each leaf that differs from the call before, of types or else of values."""
    lines = _changed(before.types, now.types)
    if len(lines) > 1:  # another structure follows from other leaves
        lines = [line for line in lines if not line.startswith("structure: ")]
    none = ["no argument differs in shape, dtype, weak type, sharding or value"]
    return lines or _changed(before.values, now.values) or none


def _changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    missing = [f"{name}: missing, before {before[name]}" for name in before if name not in now]
    return missing + [
        f"{name}: {text}, before {before.get(name, 'missing')}"
        for name, text in now.items()
        if before.get(name) != text
    ]
