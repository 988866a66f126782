"""Compares the gradients of a train step with those in float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from jmp_train._autocast.traced import TracedFunction
from jmp_train.policy.policy import Policy
from jmp_train.policy.precision import Precision, get_precision
from jmp_train.policy.rules import Rules
from jmp_train.step.gradients import GradResult, value_and_grad
from jmp_train.testing.float64 import check_bound, unit_roundoff
from jmp_train.testing.wide import as_received, check_call, jitted, on_host, results_in_float64
from jmp_train.tree import path_names
from jmp_train.types import Function, PyTree

#: The default bound of the relative error, in unit roundoffs of the compute dtype.
UNITS = 32
_ROWS = 10
#: The largest relative error that is put down to rounding errors of larger gradients.
_OWN = 0.25


def assert_gradients_close(
    loss_fn: Function,
    params: PyTree,
    *batch_args: Any,
    policy: str | Policy | Rules | Precision | None,
    cosine: float | None = None,
    rtol: float | None = None,
    has_aux: bool = False,
) -> None:
    """Assert that the gradients of a train step are close to those in float64.

    The gradients are those that `make_step(loss_fn, ..., policy)` applies: parameters and batch are
    cast to the compute dtype, the loss is scaled by the policy's default loss scale, which falls
    until all gradients are finite, and the gradients are unscaled in float32. The reference is the
    gradient of `loss_fn` without the policy in float64, as in `assert_close_to_float64`.

    For each leaf, `cosine` bounds the angle between gradient g and reference r, <g, r> / (|g| |r|),
    from below, and `rtol` bounds |g - r| / |r| from above. With u, the unit roundoff of the
    coarsest compute dtype, the defaults are

    | | bfloat16 | float16 | float32 |
    | --- | --- | --- | --- |
    | `rtol`: 32 u | 0.125 | 0.0156 | 1.9e-6 |
    | `cosine`: sqrt(1 - rtol^2), which that `rtol` implies | 0.9922 | 0.99988 | 1 - 1.8e-12 |

    If one of the two is given, only that one is tested. A gradient that is small next to others has
    their rounding errors. So a leaf also passes if the root mean square of g - r is at most 4 u, or
    `rtol` if that is less, times that of all gradients, and |g - r| is at most |r| / 4. The last is not
    asked where the exact gradient is zero (a bias before a normalisation): where the root mean square
    of r is at most u^2 times that of all gradients.

    Args:
      loss_fn: `loss_fn(params, batch, *args)`, as `value_and_grad` takes it.
      params: pytree of floating arrays.
      *batch_args: the batch, and further arguments; leaves that are not arrays reach `loss_fn`
        unchanged.
      policy: an argument of `get_precision`. With None, for a loss function that casts by itself or
        runs under `autocast`, u is that of float32; give bounds then.
      cosine: smallest cosine of a leaf.
      rtol: largest relative error of a leaf, in the Euclidean norm.
      has_aux: whether `loss_fn` returns `(loss, aux)`.

    Raises:
      AssertionError: with a table of the leaves that fail, worst first; if `params` has no element.
      ValueError: for an unknown policy, or a bound that is NaN or out of its range: `cosine` is at
        most 1, `rtol` finite and not negative.

    >>> import jax.numpy as jnp
    >>> def loss_fn(w, x):
    ...     return jnp.mean((x @ w).astype(jnp.float32) ** 2)
    >>> x = jnp.linspace(0.1, 1, 32).reshape(8, 4)
    >>> w = jnp.array([0.1, 0.2, 0.3, 0.4])
    >>> assert_gradients_close(loss_fn, w, x, policy="mixed_bfloat16")
    >>> assert_gradients_close(loss_fn, w, x, policy="mixed_bfloat16", rtol=1e-4)
    Traceback (most recent call last):
    AssertionError: ...
    """
    precision = get_precision(policy)
    check_bound("rtol", rtol)
    if cosine is not None and not -1 <= cosine <= 1:
        raise ValueError(f"cosine is {cosine}; expected a number from -1 to 1, such as 0.99")
    unit = max((unit_roundoff(p.compute_dtype) for p in precision.policies), default=2.0**-24)
    if cosine is None and rtol is None:
        rtol = UNITS * unit
        cosine = math.sqrt(1 - rtol**2)
    if not any(np.size(leaf) for leaf in jax.tree.leaves(params)):
        raise AssertionError(
            "assert_gradients_close: found no parameter with an element; expected a pytree of arrays"
        )
    check_call("assert_gradients_close", loss_fn, (params, batch_args))
    params = jax.tree.map(as_received, params)
    result = _gradients_of_step(loss_fn, params, batch_args, precision, has_aux)
    plain = value_and_grad(loss_fn, None, has_aux=has_aux)
    traced = TracedFunction(lambda *args: plain(*args).grads, (params, *batch_args), {})
    floor = min(4 * unit, *_errors_allowed(cosine, rtol))
    leaves = _leaves(result.grads, results_in_float64(traced), floor, unit**2)
    failing = [leaf for leaf in leaves if not leaf.passes(cosine, rtol)]
    if failing:
        raise AssertionError(_table(failing, len(leaves), cosine, rtol, result))


class LeafGradient(NamedTuple):
    """The gradient of one parameter beside its reference."""

    path: str
    cosine: float
    error: float  # |g - r| / |r|
    norm: float  # |r|
    negligible: bool  # whether g - r is rounding errors next to all gradients

    def passes(self, cosine: float | None, rtol: float | None) -> bool:
        if self.negligible:
            return True
        straight = cosine is None or self.cosine >= cosine
        return straight and (rtol is None or self.error <= rtol)


def _gradients_of_step(
    loss_fn: Function, params: PyTree, batch_args: Any, precision: Precision, has_aux: bool
) -> GradResult:
    """Return the gradients under a loss scale that falls until they are finite."""
    scale = jax.tree.map(as_received, precision.default_loss_scale())
    grad_fn = value_and_grad(loss_fn, precision, has_aux=has_aux)
    traced = TracedFunction(grad_fn, (params, *batch_args), {"loss_scale": scale})
    arrays = traced.arrays[: len(traced.arrays) - len(jax.tree.leaves(scale))]
    run = jitted(traced)
    while True:
        result = traced.rebuild(run(*map(as_received, arrays), *jax.tree.leaves(scale)))
        if bool(result.finite) or result.loss_scale.loss_scale == scale.loss_scale:
            return result
        scale = result.loss_scale


def _errors_allowed(cosine: float | None, rtol: float | None) -> list[float]:
    """Return the relative errors that each bound allows."""
    from_cosine = [] if cosine is None else [math.sqrt(1 - min(cosine, 1.0) ** 2)]
    return [*from_cosine, *([] if rtol is None else [rtol])]


def _leaves(grads: PyTree, references: PyTree, floor: float, zero: float) -> list[LeafGradient]:
    """Compare leaves; `floor` and `zero` are the errors and gradients to neglect, relative to all."""
    pairs = [
        (np.ravel(on_host(g)), np.ravel(on_host(r)))
        for g, r in zip(jax.tree.leaves(grads), jax.tree.leaves(references), strict=True)
    ]
    count = sum(r.size for _, r in pairs)
    rms = math.sqrt(sum(_norm(r) ** 2 for _, r in pairs) / max(count, 1))
    names = path_names(grads)
    return [
        _leaf(name or "params", g, r, floor * rms, zero * rms)
        for name, (g, r) in zip(names, pairs, strict=True)
    ]


def _leaf(path: str, g: np.ndarray, r: np.ndarray, floor: float, zero: float) -> LeafGradient:
    if not np.isfinite(g).all():
        return LeafGradient(path, math.nan, math.inf, _norm(r), False)
    difference, norms = _norm(g - r), _norm(g) * _norm(r)
    error = difference / _norm(r) if _norm(r) else math.inf if difference else 0.0
    cosine = float(np.vdot(r, g).real) / norms if norms else 1.0 if not difference else 0.0
    root = math.sqrt(max(g.size, 1))
    own = difference <= _OWN * _norm(r) or _norm(r) <= zero * root
    negligible = own and difference <= floor * root
    return LeafGradient(path, min(cosine, 1.0), error, _norm(r), negligible)


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x))


def _table(
    failing: list[LeafGradient],
    count: int,
    cosine: float | None,
    rtol: float | None,
    result: GradResult,
) -> str:
    bounds = [f"a cosine of at least {cosine:.6g}"] if cosine is not None else []
    bounds += [f"a relative error of at most {rtol:.3g}"] if rtol is not None else []
    scaled = "" if result.scaled_by is None else f" (loss scale {float(result.scaled_by):g})"
    worst = sorted(failing, key=lambda leaf: (-leaf.error, leaf.cosine))
    rows = [("parameter", "cosine", "relative error", "norm in float64")]
    rows += [(x.path, f"{x.cosine:.6f}", f"{x.error:.3g}", f"{x.norm:.3g}") for x in worst[:_ROWS]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    more = [f"... and {len(worst) - _ROWS} more"] if len(worst) > _ROWS else []
    head = (
        f"assert_gradients_close: expected {' and '.join(bounds)} for every parameter; "
        f"found {len(worst)} of {count} outside{scaled}:"
    )
    return "\n".join([head, *lines, *more])
