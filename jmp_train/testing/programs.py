"""Assertions on what a program must not do: wait for the host, or cost more than another."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jmp_train._jaxpr.source import (
    STRING,
    is_installed,
    is_library,
    is_standard_library,
    own_frame,
)
from jmp_train.testing.operations import Program, lower, report, stage_of, traced_operations
from jmp_train.types import Function, PyTree

#: Primitives that call Python on the host, or exchange arrays with it.
CALLBACKS = frozenset(
    {"debug_callback", "debug_print", "infeed", "io_callback", "outfeed", "pure_callback"}
)

# What JAX raises where code asks for the value of a traced array.
_READS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def assert_no_host_sync(fn: Program, *args: PyTree) -> None:
    """Assert that a function never waits for the host: no callback, and no array is read by Python.

    The function is traced, as `jax.jit` does. On every device this finds, in the function and what it
    calls, of the arguments and of what is computed from them:

    - values that Python needs: `bool(x)`, `float(x)`, `x.item()`, `np.asarray(x)`, `if x > 0:`,
      `range(x)`, `x[x > 0]`; most of these also where `try` and `except` hide JAX's error
    - `jax.device_get`, `x.copy_to_host_async()`, `jax.block_until_ready` and `x.block_until_ready()`
    - texts: `print(x)`, `rich.print(x)`, `logging`, `str(x)`, `repr(x)`, `f"{x}"` and `f"{x:.2f}"`, also of what holds
      the array, such as `{"loss": x}` or an `nnx.Param`, in code outside JAX and other installed packages
    - `pure_callback`, `io_callback`, `jax.debug.print`, `infeed` and `outfeed`

    Not found is code that a trace does not run, such as derivative rules of a function whose gradient
    is not taken, branches of Python that are not taken, or a jitted function that was traced before
    with such arguments, in which texts and `device_get` do nothing. Not found either are texts and
    `device_get` in other threads, and reads of an array that existed before the call and is not an
    argument, such as one of a closure. (What is computed from it in the function is traced, and
    found.) On a GPU or a TPU, where arrays are given, the function also runs once, on copies, under
    `jax.transfer_guard_device_to_host("disallow")`, which finds such reads too, those by `device_get`
    excepted; on a CPU they are not transfers, and JAX does not report them.

    Args:
      fn: a function, jitted or not; or what its `trace` returned, which is not run.
      *args: arguments, arrays or `jax.ShapeDtypeStruct`s in pytrees; other leaves than arrays and
        numbers reach the function as they are.

    Raises:
      AssertionError: with the source line of each callback, or of the first read.
      TypeError: if `fn` is neither a function nor a traced one.

    >>> assert_no_host_sync(lambda x: jnp.where(x > 0, x, 0.0), 1.0)
    >>> assert_no_host_sync(lambda x: x if x > 0 else 0.0, 1.0)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: assert_no_host_sync failed: expected no read of an array on the host, found one ...
    """
    with _noted_reads() as reads:
        try:
            operations = traced_operations(fn, args)
        except _READS as error:
            reads.append(_read_of(error))
            raise _host_read(reads[0]) from error
    if reads:
        raise _host_read(reads[0])
    found = [op for op in operations if op.name in CALLBACKS]
    if found:
        some = f"{len(found)} of {len(operations)} operations that call it"
        raise report("assert_no_host_sync", "no call of the host", some, found)
    is_run = stage_of(fn) is None
    is_run &= not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(args))
    is_run &= threading.get_ident() not in _NOTING  # the function of another check is traced
    if jax.default_backend() != "cpu" and is_run:
        _run_guarded(fn, args)


class _Read(NamedTuple):
    """A read of an array on the host: how, and the stack, the innermost frame first."""

    kind: str
    frames: list[traceback.FrameSummary]


# The reads that each thread notes, by the thread's number.
_NOTING: dict[int, list[_Read]] = {}
# The methods of traced arrays that are exchanged meanwhile, None where the class had none.
_EXCHANGED: dict[str, Any] = {}
_LOCK = threading.Lock()


@contextlib.contextmanager
def _noted_reads() -> Iterator[list[_Read]]:
    """Yield the reads of traced arrays for which no error of JAX need come out, in the scope and its thread.

    `device_get` and `block_until_ready` call methods that a traced array does not have, and ignore
    that; texts show the type of a traced array; the function may catch the error of a read. The class of traced arrays is changed while any thread
    is in such a scope. In other threads its methods do what they did before.
    """
    found: list[_Read] = []
    thread = threading.get_ident()
    with _LOCK:
        outer = _NOTING.get(thread)
        if not _NOTING:
            _exchange()
        _NOTING[thread] = found
    try:
        yield found
    finally:
        with _LOCK:
            del _NOTING[thread]
            if outer is not None:
                _NOTING[thread] = outer
            if not _NOTING:
                _restore()


def _exchange() -> None:
    tracer: Any = Tracer
    methods: dict[str, Any] = {
        "copy_to_host_async": _noting_method("device_get or copy_to_host_async"),
        "block_until_ready": _noting_method("block_until_ready"),
    }
    methods |= {name: _noting_text(getattr(tracer, name), tracer.__repr__) for name in _TEXTS}
    methods |= {name: _noting_error(getattr(tracer, name)) for name in _VALUES}
    _EXCHANGED.update((name, vars(tracer).get(name)) for name in methods)
    for name, method in methods.items():
        setattr(tracer, name, method)


def _restore() -> None:
    for name, method in _EXCHANGED.items():
        if method is None:
            delattr(Tracer, name)
        else:
            setattr(Tracer, name, method)
    _EXCHANGED.clear()


def _noting_method(kind: str) -> property:
    """Return a method that traced arrays have only in threads that note reads."""

    def method(array: Any) -> Callable[[], Any]:
        reads = _NOTING.get(threading.get_ident())
        if reads is None:
            raise AttributeError  # `__getattr__` of the class follows, which raises JAX's error

        def note() -> Any:
            stack = traceback.walk_stack(sys._getframe(1))
            reads.append(_Read(kind, list(traceback.StackSummary.extract(stack))))
            return array

        return note

    return property(method)


def _noting_text(plain: Callable[..., str], shown: Callable[[Any], str]) -> Callable[..., str]:
    """Return a method that is `plain` in threads that note no reads, `shown` in the others."""

    def show(array: Any, *spec: str) -> str:
        reads = _NOTING.get(threading.get_ident())
        if reads is None:
            return plain(array, *spec)
        frame = _users_frame(sys._getframe(1))
        if frame is not None:
            line = traceback.StackSummary.extract([(frame, frame.f_lineno)])
            reads.append(_Read("a text of the value", list(line)))
        return shown(array)  # takes any `spec`; JAX refuses `.2f`

    return show


def _noting_error(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that notes where a user's code asks for a value that JAX cannot give."""

    def read(array: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return plain(array, *args, **kwargs)
        except _READS as error:
            reads, frame = _NOTING.get(threading.get_ident()), sys._getframe(1)
            # NumPy reads what it is given; other packages try whether there is a value.
            while frame.f_back is not None and _is_in(
                str(frame.f_globals.get("__name__")), ("numpy",)
            ):
                frame = frame.f_back
            file = _file_of(frame)
            theirs = is_library(file) or is_installed(file) or is_standard_library(file)
            if reads is not None and not theirs:
                stack = traceback.StackSummary.extract(traceback.walk_stack(frame))
                reads.append(_Read(type(error).__name__, list(stack)))
            raise

    return read


_TEXTS = ("__format__", "__repr__", "__str__")
_VALUES = (
    "__array__", "__bool__", "__complex__", "__float__", "__index__", "__int__", "item", "tolist",
)  # fmt: skip

# Modules of pdb and VS Code that show values at a breakpoint, which is not part of the function.
_DEBUGGERS = ("bdb", "_pydevd_bundle")
# Modules that show what they are given; what others in packages make a text of is not asked for.
_SHOW = (
    "absl",
    "equinox._pretty_print",
    "flax.core.frozen_dict",
    "flax.nnx.visualization",
    "logging",
    "loguru",
    "numpy._core.arrayprint",
    "rich",
    "treescope",
    "wadler_lindig",
)
# Modules that call what they are given, as in `jax.tree.map(str, x)`, and the code in them that does.
# What their other code makes a text of is that of an error.
_CALL = ("jax._src.tree", "jax._src.tree_util")
_CALLING = ("<genexpr>", "tree_reduce")


def _users_frame(frame: FrameType | None) -> FrameType | None:
    """Return the frame of the user's code that asks for a text, itself or through an object's methods.

    The standard library, generated code and what calls a given function are passed over. A package
    that makes a text for itself, such as that of an error, has no such frame.
    """
    asked, inside = True, ""
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if _is_in(module, _DEBUGGERS):
            return None
        is_text = frame.f_code.co_name in _TEXTS
        file = _file_of(frame)
        is_generated = file.startswith("<") and is_library(file)
        if is_generated or is_standard_library(file):
            asked |= _is_in(module, _SHOW)
        elif module in _CALL:
            asked &= frame.f_code.co_name in _CALLING or inside in _CALL
        elif is_library(file) or is_installed(file):
            asked = is_text or _is_in(module, _SHOW)
        elif not (asked and is_text):
            return frame if asked else None
        frame, inside = frame.f_back, module
    return None


def _is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in packages)


def _file_of(frame: FrameType) -> str:
    """Return the file of a frame; that of its module for code of `exec`, `<stdin>` if it has none."""
    code, module = frame.f_code, frame.f_globals.get("__name__")
    is_of_dataclass = code.co_qualname.startswith("__create_fn__.")
    if code.co_filename != STRING or is_of_dataclass:
        return code.co_filename
    file = getattr(sys.modules.get(str(module)), "__file__", None)
    return "<stdin>" if module == "__main__" or not file else file


def _run_guarded(fn: Function, args: PyTree) -> None:
    # Copies, because the function may donate them.
    args = jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, args)
    try:
        with jax.transfer_guard_device_to_host("disallow"):
            jax.block_until_ready(fn(*args))
    except jax.errors.JaxRuntimeError as error:
        if "transfer" not in str(error):
            raise
        raise _host_read(_read_of(error)) from error


def _read_of(error: Exception) -> _Read:
    return _Read(type(error).__name__, list(traceback.extract_tb(error.__traceback__))[::-1])


def _host_read(read: _Read) -> AssertionError:
    """Return the error for a read on the host, at the innermost line that is the user's."""
    frame = own_frame(read.frames, lambda frame: frame.filename) or read.frames[0]
    place = f"{frame.filename}:{frame.lineno} ({frame.name})"
    line = f"{frame.line}  at {place}" if frame.line else place  # typed code may have no lines
    expected = "no read of an array on the host"
    return report("assert_no_host_sync", expected, f"one ({read.kind})", [line])


class _Cost(NamedTuple):
    """One figure of two programs; None where XLA does not tell it for the device."""

    name: str
    ours: float | None
    reference: float | None

    def is_more(self, rtol: float) -> bool:
        if self.ours is None or self.reference is None:
            return False
        return self.ours - self.reference > rtol * abs(self.reference)

    def __str__(self) -> str:
        cells = ["unknown" if x is None else f"{x:,.0f}" for x in (self.ours, self.reference)]
        change = f" ({self.ours / self.reference - 1:+.2%})" if self.ours and self.reference else ""
        return f"{self.name}: {cells[0]}, reference {cells[1]}{change}"


def assert_costs_nothing(fn: Program, reference: Program, *args: PyTree, rtol: float = 0.0) -> None:
    """Assert that a program costs no more than a reference.

    Compared are FLOPs, evaluations of transcendental functions (`exp`, `tanh`, which XLA counts apart
    from FLOPs), bytes accessed and bytes of temporary memory. The figures are XLA's own, of the
    compiled programs (`cost_analysis`, `memory_analysis`), so they do not vary between runs, but they
    are not times. A body of a loop counts once. The work inside a custom call, such as a callback or
    LAPACK's `svd`, does not count, and a figure that XLA does not know is not compared. Donate the same
    arguments in both, because donation changes the temporary memory.

    A cheaper program passes. To assert equal costs, call it a second time with the two exchanged.

    Args:
      fn: a function of `args`, jitted or not, or what its `trace`, `lower` or `compile` returned.
      reference: what it is compared with, likewise; for a function of other arguments, compile it.
      *args: arguments of the functions, arrays or `jax.ShapeDtypeStruct`s in pytrees; other leaves
        than arrays and numbers reach them as they are.
      rtol: largest excess in each figure, as a share of the reference's.

    Raises:
      AssertionError: if a figure is larger, with all figures of both, and if XLA gives no figure of
        the two programs.
      TypeError: if one is neither a function nor a compiled program.
      ValueError: for an `rtol` that is negative, infinite or NaN.

    >>> x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    >>> assert_costs_nothing(lambda x: x @ x, lambda x: jnp.matmul(x, x), x)
    """
    if not (math.isfinite(rtol) and rtol >= 0):
        raise ValueError(f"rtol is {rtol}; expected 0 or more, and finite")
    costs = _costs(_compile(fn, args), _compile(reference, args))
    if all(cost.ours is None or cost.reference is None for cost in costs):
        raise AssertionError("assert_costs_nothing failed: XLA gives no figure of the two programs")
    found = [cost for cost in costs if cost.is_more(rtol)]
    if found:
        expected = f"at most the cost of the reference (rtol={rtol})"
        some = f"{len(found)} of {len(costs)} figures that are larger"
        error = report("assert_costs_nothing", expected, some, found)
        rest = [cost for cost in costs if cost not in found]
        notes = [
            "unknown" if None in (cost.ours, cost.reference) else "as expected" for cost in rest
        ]
        lines = [f"  ({note}) {cost}" for note, cost in zip(notes, rest, strict=True)]
        raise AssertionError("\n".join([str(error), *lines]))


def _compile(program: Program, args: PyTree) -> jax.stages.Compiled:
    stage = stage_of(program)
    if isinstance(stage, jax.stages.Compiled):
        return stage
    if isinstance(stage, jax.stages.Traced):
        stage = stage.lower()
    return (lower(program, args) if stage is None else stage).compile()


#: XLA's names of the figures of `cost_analysis`.
_COUNTS = {
    "FLOPs": "flops",
    "transcendental functions": "transcendentals",
    "bytes accessed": "bytes accessed",
}


def _known(count: float | None) -> float | None:
    # XLA adds -1, for unknown, for each custom call.
    return None if count is None or count < 0 else count


def _costs(ours: jax.stages.Compiled, reference: jax.stages.Compiled) -> list[_Cost]:
    programs = (ours, reference)
    analyses: list[Any] = [program.cost_analysis() for program in programs]
    memory: list[Any] = [program.memory_analysis() for program in programs]
    # XLA leaves a count of 0 out.
    absent = 0.0 if any(analyses) else None
    counts = [
        _Cost(name, *(None if a is None else _known(a.get(key, absent)) for a in analyses))
        for name, key in _COUNTS.items()
    ]
    bytes_ = (None if m is None else m.temp_size_in_bytes for m in memory)
    return [*counts, _Cost("bytes of temporary memory", *bytes_)]
