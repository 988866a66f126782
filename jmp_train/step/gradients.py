"""`value_and_grad` under a precision policy and a loss scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmp_train.loss_scales.states import (
    DynamicLossScale,
    LossScale,
    NoOpLossScale,
    StaticLossScale,
    check_loss_scale,
    largest_power_of_two,
)
from jmp_train.numerics.dtypes import at_least_float32
from jmp_train.policy.policy import Policy
from jmp_train.policy.precision import Precision, get_precision
from jmp_train.policy.rules import Rules
from jmp_train.step.accumulation import (
    Part,
    check_micro_batches,
    check_reduce_dtype,
    combine,
    mean_of,
)
from jmp_train.tree import all_finite


class GradResult(NamedTuple):
    """What a function made by `value_and_grad` returns."""

    loss: jax.Array  # shape=(), float32 (float64 for a float64 loss): the loss itself, unscaled
    grads: Any  # as the parameters, float32 (float64 for float64 parameters), unscaled
    finite: jax.Array  # shape=(), bool: whether every gradient is finite
    loss_scale: LossScale  # for the next step
    scaled_by: jax.Array | None  # shape=(), float32: the scale of this step; None without one
    aux: Any  # what the loss function returned beside the loss; None without `has_aux`


def value_and_grad(
    loss_fn: Callable[..., Any],
    policy: str | Policy | Rules | Precision | None = "float32",
    *,
    has_aux: bool = False,
    cast_batch: bool = True,
    micro_batches: int = 1,
    axis_name: str | None = None,
    reduce_dtype: Any = None,
) -> Callable[..., GradResult]:
    """Differentiates a loss in the compute dtype and returns its gradients in float32.

    The function that comes back does, in this order: cast parameters and batch to the compute
    dtype; run the loss forward and backward in it, the backward pass started from the loss scale
    (which is what multiplying the loss would do, but the loss itself cannot overflow); convert the
    gradients to float32; divide them by the scale there; test that all are finite; adjust the
    scale.

    The gradients are those of the cast parameters: the cast itself counts as the identity.
    A loss in float16 cannot pass on a derivative above 65,504, so the scale is then capped at 2^15
    (`scaled_by` is the scale that was used).

    With micro-batches, or over the devices of a mesh axis, scaled gradients are converted to
    float32 and accumulated on each device, divided by the number of parts (or their weight), cast
    to the reduce dtype, summed over the devices, and only then unscaled and tested, once. An
    overflow in any part thus makes the whole not finite, on all devices alike.

    Args:
      loss_fn: `loss_fn(params, batch, *args, **kwargs)` returns a real scalar, or
        `(scalar, aux)` with `has_aux`. Reduce it in float32: cast the model's outputs with
        `policy.cast_to_output` first. A mean over examples; a mean over something else, tokens
        for one, as a `WeightedLoss`.
      policy: what `get_precision` takes. `Rules`, for a model under `jmp_train.flax.apply_policy`,
        and None, for a loss function under `autocast`, cast nothing.
      has_aux: whether `loss_fn` returns `(loss, aux)`. `aux` is passed through as it is.
      cast_batch: whether the batch's floating leaves are cast too. Turn it off where the batch
        holds regression targets that the compute dtype would round.
      micro_batches: the number N of equal parts that the batch's leading axis is split into; part n
        has the examples n, n + N, n + 2 N, .... One compiled body runs them in turn, so that the memory for activations is that of
        one part. Of `aux`, floating scalars are averaged, weighted like the loss, and any other
        leaf comes back with a leading axis of micro-batches. Of the keyword arguments, `key` is
        folded with the number of the part, and `model_state` is handed from part to part: `aux`
        is then `(aux, new model state)`. All others reach each part as they are.
      axis_name: the axis to average over, for a function under `jax.shard_map(...,
        check_vma=False)` that gets its device's share of the batch; `make_step(parallel=...)` sets
        that up. Each device takes its micro-batches, even if one, as parts of one batch, so `aux`
        and `key` are treated as above, and a model state's floating leaves are averaged.
      reduce_dtype: what gradients are summed over the devices in: "float32", "bfloat16",
        "float16", or None for their own, float32 (float64 for float64 parameters). bfloat16
        halves the bytes and keeps 8 bits. float16 keeps 11, but what is beyond its range becomes
        infinite, which the test then finds, or zero.

    Returns:
      `grad_fn(params, batch, *args, loss_scale=None, **kwargs) -> GradResult`; pure, to be called
      inside jit. No loss scale means none is applied. Further arguments reach `loss_fn` uncast.

    Raises:
      ValueError: for an unknown policy or reduce dtype, or less than one micro-batch; when traced,
        for a batch that cannot be split into equal micro-batches.
      TypeError: when traced, for a loss scale that is none, a loss that is not a real scalar, and for a parameter that is not
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
    whole_batch = micro_batches == 1 and axis_name is None
    to_compute = get_precision(policy).cast_to_compute
    micro_batches = check_micro_batches(micro_batches)
    reduce_dtype = check_reduce_dtype(reduce_dtype, axis_name)

    def grad_fn(
        params: Any,
        batch: Any,
        *args: Any,
        loss_scale: LossScale | None = None,
        **kwargs: Any,
    ) -> GradResult:
        scale = NoOpLossScale() if loss_scale is None else loss_scale
        check_loss_scale(scale)
        _check_params(params)
        cast_params = to_compute(params)

        def run(batch: Any, kwargs: dict[str, Any]) -> Part:
            if cast_batch:
                batch = to_compute(batch)

            def compute(params: Any) -> tuple[jax.Array, Any]:
                out = loss_fn(params, batch, *args, **kwargs)
                loss, aux = out if has_aux else (out, None)
                loss, weights = mean_of(loss, axis_name, whole=whole_batch)
                return _real_scalar(loss, has_aux), (aux, weights)

            loss, backward, (aux, weights) = jax.vjp(compute, cast_params, has_aux=True)
            (grads,) = backward(_seed(_fit(scale, loss.dtype), loss.dtype))
            return Part(loss, weights, _widen(grads, params), aux)

        if whole_batch:
            whole = run(batch, kwargs)
            loss_dtype = whole.loss.dtype
        else:
            whole, loss_dtype = combine(
                run,
                params,
                batch,
                kwargs,
                micro_batches=micro_batches,
                axis_name=axis_name,
                reduce_dtype=reduce_dtype,
            )
        scale = _fit(scale, loss_dtype)
        seed = _seed(scale, loss_dtype)
        grads = _unscale(whole.grads, scale, seed)
        finite = all_finite(grads)
        return GradResult(
            loss=whole.loss.astype(at_least_float32(whole.loss.dtype)),
            grads=grads,
            finite=finite,
            loss_scale=scale.adjust(finite),
            scaled_by=None if isinstance(scale, NoOpLossScale) else seed.astype(jnp.float32),
            aux=whole.aux,
        )

    return grad_fn


def _check_params(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"parameter {name!r} has dtype {dtype}; expected a floating dtype: keep what is not "
                "trained (counters, PRNG keys) out of the parameters"
            )


def _real_scalar(loss: Any, has_aux: bool) -> jax.Array:
    hint = "" if has_aux else "; for (loss, aux) pass has_aux=True"
    try:
        array = jnp.asarray(loss)
    except (TypeError, ValueError):
        raise TypeError(
            f"the loss is a {type(loss).__name__}; expected a real scalar{hint}"
        ) from None
    if array.shape != () or not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"the loss has shape {array.shape} and dtype {array.dtype}; expected a real scalar of "
            f"shape (){hint}"
        )
    return array


def _fit(loss_scale: LossScale, dtype: Any) -> LossScale:
    """Caps a dynamic scale at what the loss's own dtype can carry back; free for a float32 loss."""
    limit = largest_power_of_two(dtype)
    dynamic = isinstance(loss_scale, DynamicLossScale)
    if not dynamic or limit >= largest_power_of_two(jnp.float32):
        return loss_scale
    return dataclasses.replace(loss_scale, loss_scale=jnp.minimum(loss_scale.loss_scale, limit))


def _seed(loss_scale: LossScale, dtype: Any) -> jax.Array:
    """What the backward pass starts from; a static scale is capped here and stays what it is."""
    scale = loss_scale.loss_scale
    if isinstance(loss_scale, StaticLossScale):
        scale = min(scale, largest_power_of_two(dtype))
    return jnp.asarray(scale, dtype)


def _unscale(grads: Any, loss_scale: LossScale, seed: jax.Array) -> Any:
    """Divides by what the loss was really multiplied by: bfloat16 holds 1.1 * 2^16 to three digits."""
    if isinstance(loss_scale, NoOpLossScale):
        return grads
    return jax.tree.map(lambda g: g / seed.astype(jnp.finfo(g.dtype).dtype), grads)


def _widen(grads: Any, params: Any) -> Any:
    """Gradients in float32, or in the parameters' own dtype where that is wider."""
    return jax.tree.map(lambda g, p: g.astype(at_least_float32(jnp.result_type(p))), grads, params)
