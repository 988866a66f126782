"""Assertions on what a program must not do: wait for the host, or cost more than another."""

from __future__ import annotations

import traceback
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmp_train._jaxpr.source import is_library
from jmp_train.testing.operations import Program, report, traced_operations
from jmp_train.types import Function, PyTree

#: Primitives that call Python on the host, or exchange arrays with it.
CALLBACKS = frozenset(
    {"debug_callback", "debug_print", "infeed", "io_callback", "outfeed", "pure_callback"}
)

# What JAX raises where code asks for the value of a traced array.
_READS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def assert_no_host_sync(fn: Function, *args: PyTree) -> None:
    """Assert that a function never waits for the host: no callback, and no array is read by Python.

    The function is traced, as `jax.jit` does, so on every device `bool(x)`, `float(x)`, `x.item()`,
    `np.asarray(x)` and `if x > 0:` are found at the line that has them, and so are `pure_callback`,
    `io_callback` and `jax.debug.print`. On a GPU or a TPU, where arrays are given, the function
    also runs once, on copies, under `jax.transfer_guard_device_to_host("disallow")`: this finds
    reads of arrays that are not arguments.

    Args:
      fn: a function, jitted or not.
      *args: arguments, arrays or `jax.ShapeDtypeStruct`s in pytrees.

    Raises:
      AssertionError: with the source line of each callback, or of the first read.
      TypeError: if `fn` is not a function.

    >>> assert_no_host_sync(lambda x: jnp.where(x > 0, x, 0.0), 1.0)
    >>> assert_no_host_sync(lambda x: x if x > 0 else 0.0, 1.0)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: assert_no_host_sync failed: expected no read of an array on the host, found one ...
    """
    try:
        operations = traced_operations(fn, args)
    except _READS as error:
        raise _read(error) from error
    found = [op for op in operations if op.name in CALLBACKS]
    if found:
        some = f"{len(found)} of {len(operations)} operations that call it"
        raise report("assert_no_host_sync", "no call of the host", some, found)
    arrays = jax.tree.leaves(args)
    if jax.default_backend() != "cpu" and all(isinstance(x, jax.Array) for x in arrays):
        _run_guarded(fn, args)


def _run_guarded(fn: Function, args: PyTree) -> None:
    args = jax.tree.map(jnp.copy, args)  # the function may donate them
    try:
        with jax.transfer_guard_device_to_host("disallow"):
            jax.block_until_ready(fn(*args))
    except jax.errors.JaxRuntimeError as error:
        if "transfer" not in str(error):
            raise
        raise _read(error) from error


def _read(error: Exception) -> AssertionError:
    """Return the error for a read on the host, at the innermost line that is the user's."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not is_library(frame.filename)] or list(frames)
    frame = users[-1]
    line = f"{frame.line}  at {frame.filename}:{frame.lineno} ({frame.name})"
    expected = "no read of an array on the host"
    return report("assert_no_host_sync", expected, f"one ({type(error).__name__})", [line])


class _Cost(NamedTuple):
    """One figure of two programs; None where XLA does not tell it for the device."""

    name: str
    ours: float | None
    reference: float | None

    def differs(self, rtol: float) -> bool:
        if self.ours is None or self.reference is None:
            return False
        return abs(self.ours - self.reference) > rtol * abs(self.reference)

    def __str__(self) -> str:
        cells = ["unknown" if x is None else f"{x:,.0f}" for x in (self.ours, self.reference)]
        change = f" ({self.ours / self.reference - 1:+.2%})" if self.ours and self.reference else ""
        return f"{self.name}: {cells[0]}, reference {cells[1]}{change}"


def assert_costs_nothing(fn: Program, reference: Program, *args: PyTree, rtol: float = 0.0) -> None:
    """Assert that a program costs what a reference does: FLOPs, bytes accessed, temporary memory.

    The figures are XLA's own, of the compiled programs (`cost_analysis`, `memory_analysis`), so
    they do not vary between runs, but they are not times. A body of a loop counts once. Donate the
    same arguments in both, because donation changes the temporary memory.

    Args:
      fn: a function of `args`, jitted or not, or a `jax.stages.Compiled`.
      reference: what it is compared with, likewise; for a function of other arguments, compile it.
      *args: arguments of the functions, arrays or `jax.ShapeDtypeStruct`s in pytrees.
      rtol: largest difference in each figure, as a share of the reference's.

    Raises:
      AssertionError: with all figures of both, and if XLA gives no figure of the two programs.
      TypeError: if one is neither a function nor a compiled program.
      ValueError: for a negative `rtol`.

    >>> x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    >>> assert_costs_nothing(lambda x: x @ x, lambda x: jnp.matmul(x, x), x)
    """
    if rtol < 0:
        raise ValueError(f"rtol is {rtol}; expected 0 or more")
    costs = _costs(_compile(fn, args), _compile(reference, args))
    if all(cost.ours is None or cost.reference is None for cost in costs):
        raise AssertionError("assert_costs_nothing failed: XLA gives no figure of the two programs")
    found = [cost for cost in costs if cost.differs(rtol)]
    if found:
        rest = [cost for cost in costs if cost not in found]
        expected = f"the cost of the reference (rtol={rtol})"
        some = f"{len(found)} of {len(costs)} figures that differ"
        error = report("assert_costs_nothing", expected, some, found)
        raise AssertionError("\n".join([str(error), *(f"  (as expected) {cost}" for cost in rest)]))


def _compile(program: Program, args: PyTree) -> jax.stages.Compiled:
    if isinstance(program, jax.stages.Compiled):
        return program
    if not callable(program):
        kind = type(program).__name__
        raise TypeError(f"expected a function or a compiled program, got {kind}")
    jitted: Any = program if hasattr(program, "lower") else jax.jit(lambda *args: program(*args))
    return jitted.lower(*args).compile()


def _costs(ours: jax.stages.Compiled, reference: jax.stages.Compiled) -> list[_Cost]:
    pair = [_figures(ours), _figures(reference)]
    return [_Cost(name, pair[0].get(name), pair[1].get(name)) for name in _NAMES]


_NAMES = ("FLOPs", "bytes accessed", "bytes of temporary memory")


def _figures(program: jax.stages.Compiled) -> dict[str, float]:
    cost: Any = program.cost_analysis()
    memory: Any = program.memory_analysis()
    found = {} if cost is None else {"FLOPs": cost.get("flops"), _NAMES[1]: cost.get(_NAMES[1])}
    if memory is not None:
        found[_NAMES[2]] = memory.temp_size_in_bytes
    return {name: value for name, value in found.items() if value is not None}
