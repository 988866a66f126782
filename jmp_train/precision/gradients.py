"""`value_and_grad` under a precision policy and a loss scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmp_train.precision.dtypes import at_least_float32
from jmp_train.precision.loss_scale import (
    DynamicLossScale,
    LossScale,
    NoOpLossScale,
    all_finite,
    largest_power_of_two,
)
from jmp_train.precision.policy import Policy, get_policy


class GradResult(NamedTuple):
    """What a function made by `value_and_grad` returns."""

    loss: jax.Array  # shape=(), float32 (float64 for a float64 loss): the loss itself, unscaled
    grads: Any  # as the parameters, float32 (float64 for float64 parameters), unscaled
    finite: jax.Array  # shape=(), bool: whether every gradient is finite
    loss_scale: LossScale  # for the next step
    aux: Any  # what the loss function returned beside the loss; None without `has_aux`


def value_and_grad(
    loss_fn: Callable[..., Any],
    policy: str | Policy | None = "float32",
    *,
    has_aux: bool = False,
    cast_batch: bool = True,
) -> Callable[..., GradResult]:
    """Differentiates a loss in the compute dtype and returns its gradients in float32.

    The function that comes back does, in this order: cast parameters and batch to the compute
    dtype; run the loss forward and backward in it, the backward pass started from the loss scale
    (which is what multiplying the loss would do, but the loss itself cannot overflow); convert the
    gradients to float32; divide them by the scale there; test that all are finite; adjust the
    scale.

    The gradients are those of the cast parameters: the cast itself counts as the identity.
    A loss in float16 cannot pass on a derivative above 65,504, so the scale is then held at 2^15.

    Args:
      loss_fn: `loss_fn(params, batch, *args, **kwargs)` returns a real scalar, or
        `(scalar, aux)` with `has_aux`. Reduce it in float32: cast the model's outputs with
        `policy.cast_to_output` first.
      policy: a `Policy` or a string for `get_policy`; None casts nothing, for a loss function that
        does so itself (`autocast`, or a model under `jmp_train.flax.apply_policy`).
      has_aux: whether `loss_fn` returns `(loss, aux)`. `aux` is passed through as it is.
      cast_batch: whether the batch's floating leaves are cast too. Turn it off where the batch
        holds regression targets that the compute dtype would round.

    Returns:
      `grad_fn(params, batch, *args, loss_scale=None, **kwargs) -> GradResult`; pure, to be called
      inside jit. No loss scale means none is applied. Further arguments reach `loss_fn` uncast.

    Raises:
      ValueError: for an unknown policy.
      TypeError: when traced, for a loss that is not a real scalar, and for a parameter that is not
        floating (a counter or a PRNG key, say), by its path.

    >>> def loss_fn(params, batch):
    ...     return jnp.mean((batch["x"] @ params["w"]).astype(jnp.float32) ** 2)
    >>> grad_fn = jax.jit(value_and_grad(loss_fn, "mixed_float16"))
    >>> params, batch = {"w": jnp.ones((2, 1))}, {"x": jnp.ones((3, 2))}
    >>> result = grad_fn(params, batch, loss_scale=DynamicLossScale(2.0**16))
    >>> float(result.loss), result.grads["w"].dtype, bool(result.finite)
    (4.0, dtype('float32'), False)

    That scale was too large for these gradients (4 x 2^16 is above 65,504), so the next one is
    halved:

    >>> float(result.loss_scale.loss_scale)
    32768.0

    Source: Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740.
    """
    to_compute = _as_it_is if policy is None else get_policy(policy).cast_to_compute

    def grad_fn(
        params: Any,
        batch: Any,
        *args: Any,
        loss_scale: LossScale | None = None,
        **kwargs: Any,
    ) -> GradResult:
        loss_scale = NoOpLossScale() if loss_scale is None else loss_scale
        _check_params(params)
        if cast_batch:
            batch = to_compute(batch)

        def compute(params: Any) -> tuple[jax.Array, Any]:
            out = loss_fn(params, batch, *args, **kwargs)
            loss, aux = out if has_aux else (out, None)
            return _real_scalar(loss), aux

        loss, backward, aux = jax.vjp(compute, to_compute(params), has_aux=True)
        loss_scale = _fit(loss_scale, loss.dtype)
        seed = jnp.asarray(loss_scale.loss_scale, loss.dtype)
        (grads,) = backward(seed)
        grads = _unscale(_widen(grads, params), loss_scale, seed)
        finite = all_finite(grads)
        return GradResult(
            loss=loss.astype(at_least_float32(loss.dtype)),
            grads=grads,
            finite=finite,
            loss_scale=loss_scale.adjust(finite),
            aux=aux,
        )

    return grad_fn


def _as_it_is(tree: Any) -> Any:
    return tree


def _check_params(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"parameter {name!r} has dtype {dtype}; expected a floating dtype: keep what is not "
                "trained (counters, PRNG keys) out of the parameters"
            )


def _real_scalar(loss: Any) -> jax.Array:
    loss = jnp.asarray(loss)
    if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(
            f"the loss has shape {loss.shape} and dtype {loss.dtype}; expected a real scalar of "
            "shape (); for (loss, aux) pass has_aux=True"
        )
    return loss


def _fit(loss_scale: LossScale, dtype: Any) -> LossScale:
    """Holds the scale at what the loss's own dtype can carry back; free for a float32 loss."""
    limit = largest_power_of_two(dtype)
    if isinstance(loss_scale, NoOpLossScale) or limit >= largest_power_of_two(jnp.float32):
        return loss_scale
    if isinstance(loss_scale, DynamicLossScale):
        return dataclasses.replace(loss_scale, loss_scale=jnp.minimum(loss_scale.loss_scale, limit))
    return dataclasses.replace(loss_scale, loss_scale=min(loss_scale.loss_scale, limit))


def _unscale(grads: Any, loss_scale: LossScale, seed: jax.Array) -> Any:
    """Divides by what the loss was really multiplied by: bfloat16 holds 1.1 * 2^16 to three digits."""
    if isinstance(loss_scale, NoOpLossScale):
        return grads
    return jax.tree.map(lambda g: g / seed.astype(jnp.finfo(g.dtype).dtype), grads)


def _widen(grads: Any, params: Any) -> Any:
    """Gradients in float32, or in the parameters' own dtype where that is wider."""
    return jax.tree.map(lambda g, p: g.astype(at_least_float32(jnp.result_type(p))), grads, params)
