"""Compares a function with itself in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train._autocast.traced import TracedFunction
from jmp_train._autocast.transform import autocast
from jmp_train._jaxpr.compat import Operand
from jmp_train.policy.policy import Policy
from jmp_train.policy.precision import Precision, get_precision
from jmp_train.testing.wide import (
    as_received,
    check_call,
    jitted,
    on_host,
    results_in_float64,
    wide_dtype,
)
from jmp_train.testing.worst import worst_operation
from jmp_train.tree import path_name
from jmp_train.types import DTypeLike, Function


def assert_close_to_float64(
    fn: Function,
    *args: Any,
    policy: str | Policy | Precision | None = None,
    ulps: float | None = None,
    rtol: float | None = None,
) -> None:
    """Assert that a function's results are close to those of the same function in float64.

    The function runs jitted. The reference is the function as written, with float64 in place of
    every floating dtype of its program: `astype(float32)`, `preferred_element_type`, constants and
    derivative rules narrow nothing. What the program was given stays: random numbers as the samplers of
    `jax.random` draw them, and the value of a constant (0.1 in a float32 program is 0.100000001). The
    process keeps its setting of `jax_enable_x64`.

    For each element of a floating result,

        |result - reference| <= bound * max(|reference|, size of the leaf)

    so an element near zero is measured by the size of its leaf, as the rounding errors of sums and
    products are, and a large one by its own size. The size of a leaf is the largest |reference| after
    the largest quarter of its finite elements other than zero is left out. So a few outliers hide no
    errors of the others in a leaf of four elements or more; of two or three, the largest is the size.
    A leaf of which more than three quarters are tiny is judged by these.

    `bound` is `rtol`, or `ulps` times the unit roundoff u (half the distance from 1 to the next
    number): 2^-24 for float32, 2^-11 for float16, 2^-8 for bfloat16. A result rounded once has an
    error of at most 1 u. The format is that of the result or the policy's compute dtype, the coarser
    one. Infinities and NaN must be those of the reference; integers and booleans must be equal.

    Args:
      fn: a pure function of pytrees; leaves of the arguments that are not arrays reach it unchanged.
      *args: its arguments. Use `functools.partial` for keyword arguments.
      policy: a policy, under whose compute dtype the function runs by `autocast`; None to run it as
        it stands.
      ulps: largest error in units of u.
      rtol: largest relative error; give one of the two.

    Raises:
      AssertionError: with the worst element, and the operation whose own rounding errors move it most
        (found by running the program operation by operation, which takes longer); if the function
        returns no array with an element.
      ValueError: for an unknown policy, rules, not exactly one bound, or a bound that is negative,
        infinite or NaN.
      TypeError: if `fn` is not a function, or if an argument is a `jax.ShapeDtypeStruct`.

    Float32 products on a GPU may be in TF32, which fails a bound for float32; compare them under
    `jax.default_matmul_precision("highest")`. Operations that JAX does not describe (Pallas kernels,
    callbacks, foreign and exported functions) run in their own dtypes in the reference too, so errors
    inside them are not found.

    >>> import jax.numpy as jnp
    >>> x = jnp.linspace(0, 1, 100)
    >>> assert_close_to_float64(jnp.sum, x, ulps=4)
    >>> assert_close_to_float64(lambda x: jnp.sum(x * x) - jnp.sum(x) ** 2 / 99, x, ulps=4)
    Traceback (most recent call last):
    AssertionError: ...

    Source: Higham 2002, "Accuracy and Stability of Numerical Algorithms", chapters 2 and 3.
    """
    if (ulps is None) == (rtol is None):
        raise ValueError(f"ulps is {ulps} and rtol is {rtol}; expected one of the two")
    check_bound("ulps", ulps)
    check_bound("rtol", rtol)
    check_call("assert_close_to_float64", fn, args)
    bound = Bound(ulps, rtol, _compute_dtype(policy))
    plain = TracedFunction(fn, args, {})
    traced = plain
    if bound.compute is not None:
        traced = TracedFunction(autocast(fn, bound.compute), args, {})
    results = traced.rebuild(jitted(traced)(*map(as_received, traced.arrays)))
    found = _leaf_errors(results, results_in_float64(plain), bound)
    if not found:
        raise AssertionError(
            "assert_close_to_float64: found no array with an element among the results; expected a "
            "function that returns what is to be compared"
        )
    failing = [leaf for leaf in found if leaf.error > leaf.bound]
    if failing:
        worst = max(failing, key=lambda leaf: leaf.error / leaf.unit)
        raise AssertionError(_message(worst, bound, traced))


class Bound(NamedTuple):
    """The bound of the errors: in unit roundoffs or relative, and the policy's compute dtype."""

    ulps: float | None
    rtol: float | None
    compute: np.dtype | None

    def largest(self, unit: float) -> float:
        """Return the largest error, relative, for a unit roundoff."""
        return self.rtol if self.rtol is not None else (self.ulps or 0.0) * unit

    def format_of(self, dtype: DTypeLike) -> np.dtype:
        """Return the format whose unit roundoff bounds the errors of a floating or complex result."""
        own = np.dtype(jnp.finfo(dtype).dtype)
        return own if self.compute is None else max(own, self.compute, key=unit_roundoff)


class LeafError(NamedTuple):
    """The worst element of a result; `error` is relative to `scale`."""

    path: str
    number: int  # of the leaf
    at: tuple[int, ...]
    value: Any
    reference: Any
    error: float
    scale: float
    bound: float
    unit: float  # unit roundoff of the format; 1 for integers, booleans and keys
    format: str


def unit_roundoff(dtype: DTypeLike) -> float:
    """Return half the distance from 1 to the next number of a format.

    >>> unit_roundoff("bfloat16") == 2.0**-8
    True
    """
    return float(jnp.finfo(dtype).eps) / 2


def check_bound(name: str, bound: float | None) -> None:
    """Raise ValueError for a bound of errors that is negative, infinite or NaN; None is valid."""
    if bound is not None and not 0 <= bound < math.inf:
        raise ValueError(f"{name} is {bound}; expected a finite number of at least 0, such as 4")


def _compute_dtype(policy: Any) -> np.dtype | None:
    if policy is None:
        return None
    whole = get_precision(policy).whole
    if whole is None:
        raise ValueError(f"policy is {policy!r}; expected one policy, such as 'mixed_bfloat16'")
    return whole.compute_dtype


def _leaf_errors(results: Any, references: Any, bound: Bound) -> list[LeafError]:
    """Return the worst element of each leaf that is an array."""
    named = jax.tree_util.tree_leaves_with_path(results)
    pairs = zip(named, jax.tree.leaves(references), strict=True)
    return [
        _leaf_error(path_name(path) or "result", n, result, reference, bound)
        for n, ((path, result), reference) in enumerate(pairs)
        if isinstance(result, jax.Array) and result.size
    ]


def _leaf_error(
    path: str, number: int, result: jax.Array, reference: Operand, bound: Bound
) -> LeafError:
    if wide_dtype(result.dtype) is None:
        return _inequality(path, number, result, reference)
    format_ = bound.format_of(result.dtype)
    unit = unit_roundoff(format_)
    values = on_host(result)
    errors, scales = _relative_errors(values, reference)
    at = _index_of_largest(errors)
    error, scale = float(errors[at]), float(scales[at])
    pair = values[at], reference[at]
    return LeafError(path, number, at, *pair, error, scale, bound.largest(unit), unit, format_.name)


def _relative_errors(values: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return errors relative to `max(|reference|, size of the leaf)`, and these scales."""
    with np.errstate(all="ignore"):
        scales = np.maximum(np.abs(reference), _size_of(reference))
        same = (values == reference) | (np.isnan(values) & np.isnan(reference))
        errors = np.where(same, 0.0, np.abs(values - reference) / scales)
    return np.where(np.isnan(errors), math.inf, errors), scales


def _size_of(reference: np.ndarray) -> float:
    """Return the largest magnitude after the largest quarter is left out; 0 for a leaf of zeros."""
    magnitudes = np.abs(reference[np.isfinite(reference) & (reference != 0)])
    if not magnitudes.size:
        return 0.0
    index = magnitudes.size - 1 - magnitudes.size // 4
    return float(np.partition(magnitudes, index)[index])


def _inequality(path: str, number: int, result: Operand, reference: Operand) -> LeafError:
    """Return the first element in which integers, booleans or keys differ."""
    name = result.dtype.name
    if jnp.issubdtype(result.dtype, jax.dtypes.extended):
        result, reference = jax.random.key_data(result), jax.random.key_data(reference)
    values, reference = np.asarray(result), np.asarray(reference)
    differ = values != reference
    at = _index_of_largest(differ)
    error = math.inf if differ.any() else 0.0
    return LeafError(path, number, at, values[at], reference[at], error, 1.0, 0.0, 1.0, name)


def _index_of_largest(x: np.ndarray) -> tuple[int, ...]:
    return tuple(map(int, np.unravel_index(int(np.argmax(x)), x.shape)))


def _message(worst: LeafError, bound: Bound, traced: TracedFunction) -> str:
    place = f"{worst.path}[{', '.join(map(str, worst.at))}]" if worst.at else worst.path
    found = f"{worst.value} instead of {worst.reference} at {place}"
    if worst.unit == 1.0:
        return f"assert_close_to_float64: expected equal {worst.format}; found {found}"

    def show(error: float) -> str:
        return f"{error:.3g}" if bound.ulps is None else f"{error / worst.unit:.3g} u"

    unit = "" if bound.ulps is None else f" (u = {worst.unit:.3g}, of {worst.format})"
    message = (
        f"assert_close_to_float64: expected errors of at most {show(worst.bound)}{unit}; "
        f"found {show(worst.error)}: {found}"
    )
    operation = worst_operation(traced, lambda outs: _element(traced, outs, worst))
    if operation is None:
        return message
    moved = operation.effect / worst.scale if worst.scale else math.inf
    alone = f"its rounding errors alone make {show(moved)}"
    return f"{message}. Worst operation: {operation.description}; {alone}"


def _element(traced: TracedFunction, outs: Sequence[Operand], worst: LeafError) -> float:
    leaf = jax.tree.leaves(traced.rebuild(outs))[worst.number]
    return np.asarray(leaf)[worst.at]
