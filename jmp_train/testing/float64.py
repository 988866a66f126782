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
from jmp_train._jaxpr import compat
from jmp_train._jaxpr.compat import Operand
from jmp_train.numerics.dtypes import is_floating
from jmp_train.policy.policy import Policy
from jmp_train.policy.precision import Precision, get_precision
from jmp_train.testing.operations import worst_operation
from jmp_train.testing.wide import as_numpy, as_received, results_in_float64, wide_dtype, widen
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
    derivative rules narrow nothing. Random numbers are those of the program. The process keeps its
    setting of `jax_enable_x64`.

    For each element of a floating result,

        |result - reference| <= bound * max(|reference|, root mean square of the leaf's reference)

    so an element near zero is measured by the size of its leaf, as the rounding errors of sums and
    products are, and a large one by its own size: one outlier hides no errors of the others. `bound`
    is `rtol`, or `ulps` times the unit roundoff u (half the distance from 1 to the next number):
    2^-24 for float32, 2^-11 for float16, 2^-8 for bfloat16. A result rounded once has an error of
    at most 1 u. The format is that of the result or the policy's compute dtype, the coarser one.
    Infinities and NaN must be those of the reference; integers and booleans must be equal.

    Args:
      fn: a pure function of pytrees; leaves of the arguments that are not arrays reach it unchanged.
      *args: its arguments. Use `functools.partial` for keyword arguments.
      policy: a policy, under whose compute dtype the function runs by `autocast`; None to run it as
        it stands.
      ulps: largest error in units of u.
      rtol: largest relative error; give one of the two.

    Raises:
      AssertionError: with the worst element, and the operation whose own rounding errors move it most
        (found by running the program operation by operation, which takes longer).
      ValueError: for an unknown policy, rules, or not exactly one bound.

    Operations that JAX does not describe (Pallas kernels, callbacks, foreign functions) and
    `shard_map` run in their own dtypes in the reference too.

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
    compute = _compute_dtype(policy)
    plain = TracedFunction(fn, args, {})
    traced = plain if compute is None else TracedFunction(autocast(fn, compute), args, {})
    run = jax.jit(
        lambda *arrays: compat.eval_jaxpr(traced.closed.jaxpr, traced.closed.consts, *arrays)
    )
    results = traced.rebuild(run(*map(as_received, traced.arrays)))
    errors = [
        _leaf_error(path, *leaves, compute, ulps, rtol)
        for path, *leaves in _leaves(results, results_in_float64(plain))
    ]
    worst = max(errors, key=lambda error: error.error / max(error.bound, 1e-300), default=None)
    if worst is None or worst.error <= worst.bound:
        return
    raise AssertionError(_message(worst, ulps is not None, traced))


class LeafError(NamedTuple):
    """The worst element of a result."""

    path: str
    leaf: int  # number of the leaf
    index: tuple[int, ...]
    value: Any
    reference: Any
    error: float  # relative to `scale`
    scale: float
    bound: float
    unit: float  # unit roundoff of the format
    format: str


def unit_roundoff(dtype: DTypeLike) -> float:
    """Return half the distance from 1 to the next number of a format.

    >>> unit_roundoff("bfloat16") == 2.0**-8
    True
    """
    return float(jnp.finfo(dtype).eps) / 2


def _compute_dtype(policy: Any) -> np.dtype | None:
    if policy is None:
        return None
    whole = get_precision(policy).whole
    if whole is None:
        raise ValueError(f"policy is {policy!r}; expected one policy, such as 'mixed_bfloat16'")
    return whole.compute_dtype


def _leaves(results: Any, references: Any) -> list[tuple[str, int, Operand, Operand]]:
    """Return path, number, result and reference of each leaf that is an array."""
    named = jax.tree_util.tree_leaves_with_path(results)
    pairs = zip(named, jax.tree.leaves(references), strict=True)
    found = []
    for n, ((path, result), reference) in enumerate(pairs):
        if isinstance(result, jax.Array):
            found.append((path_name(path) or "result", n, result, as_numpy(reference)))
    return found


def _leaf_error(
    path: str,
    leaf: int,
    result: jax.Array,
    reference: Operand,
    compute: np.dtype | None,
    ulps: float | None,
    rtol: float | None,
) -> LeafError:
    """Return the worst element of a leaf."""
    if wide_dtype(result.dtype) is None:
        return _inequality(path, leaf, result, reference)
    format_ = np.dtype(jnp.finfo(result.dtype).dtype)
    if compute is not None:
        format_ = max(format_, compute, key=unit_roundoff)
    unit = unit_roundoff(format_)
    bound = rtol if ulps is None else ulps * unit
    values = np.asarray(widen(result))
    if values.size == 0:
        return LeafError(path, leaf, (), 0, 0, 0.0, 1.0, bound or 0.0, unit, format_.name)
    errors, scales = _relative_errors(values, reference)
    index = np.unravel_index(int(np.argmax(errors)), values.shape)
    place = tuple(int(i) for i in index)
    return LeafError(
        path, leaf, place, values[index], reference[index], float(errors[index]),
        float(scales[index]), bound or 0.0, unit, format_.name,
    )  # fmt: skip


def _relative_errors(values: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return errors relative to `max(|reference|, root mean square)`, and these scales."""
    with np.errstate(all="ignore"):
        finite = np.abs(reference[np.isfinite(reference)])
        largest = finite.max(initial=0.0)  # divided out, so that no square overflows
        rms = largest * np.sqrt(np.mean(np.square(finite / largest))) if largest > 0 else 0.0
        scales = np.maximum(np.abs(reference), rms)
        same = (values == reference) | (np.isnan(values) & np.isnan(reference))
        errors = np.where(same, 0.0, np.abs(values - reference) / scales)
    return np.where(np.isnan(errors), math.inf, errors), scales


def _inequality(path: str, leaf: int, result: jax.Array, reference: Operand) -> LeafError:
    """Return the first element in which integers, booleans or keys differ."""
    if jnp.issubdtype(result.dtype, jax.dtypes.extended):
        result, reference = jax.random.key_data(result), jax.random.key_data(reference)
    values, reference = np.asarray(result), np.asarray(reference)
    differ = values != reference
    error = math.inf if differ.any() else 0.0
    index = np.unravel_index(int(np.argmax(differ)), differ.shape) if differ.size else ()
    pair = (values[index], reference[index]) if differ.size else (0, 0)
    place = tuple(int(i) for i in index)
    return LeafError(path, leaf, place, *pair, error, 1.0, 0.0, 1.0, result.dtype.name)


def _message(worst: LeafError, in_ulps: bool, traced: TracedFunction) -> str:
    at = f"{worst.path}[{', '.join(map(str, worst.index))}]" if worst.index else worst.path
    found = f"{worst.value} instead of {worst.reference} at {at}"
    if not is_floating(worst.format) and worst.unit == 1.0:
        return f"assert_close_to_float64: expected equal {worst.format}; found {found}"
    show = lambda error: (
        f"{error / worst.unit:.3g} u of {worst.format} (u = {worst.unit:.3g})"
        if in_ulps
        else f"{error:.3g}"
    )
    message = (
        f"assert_close_to_float64: expected errors of at most {show(worst.bound)}; "
        f"found {show(worst.error)}: {found}"
    )
    operation = worst_operation(traced, lambda outs: _element(traced, outs, worst))
    if operation is None:
        return message
    moved = operation.effect / worst.scale if worst.scale else math.inf
    return (
        f"{message}. Worst operation: {operation.description}; its errors alone make {show(moved)}"
    )


def _element(traced: TracedFunction, outs: Sequence[Operand], worst: LeafError) -> float:
    leaf = jax.tree.leaves(traced.rebuild(outs))[worst.leaf]
    return np.asarray(leaf)[worst.index]
