"""`value_and_grad` with a precision policy and a loss scale."""

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
from jmp_train.types import DTypeLike, Function, PyTree


class GradResult(NamedTuple):
    """Result of a function that `value_and_grad` made."""

    loss: jax.Array  # shape=(), float32 (float64 for a float64 loss); unscaled
    grads: PyTree  # like the parameters, float32 (float64 for float64 parameters); unscaled
    finite: jax.Array  # shape=(), bool: whether every gradient is finite
    loss_scale: LossScale  # for the next step
    scaled_by: jax.Array | None  # shape=(), float32: loss scale of this step; None without one
    aux: PyTree  # auxiliary output of the loss function; None without `has_aux`


def value_and_grad(
    loss_fn: Function,
    policy: str | Policy | Rules | Precision | None = "float32",
    *,
    has_aux: bool = False,
    cast_batch: bool = True,
    micro_batches: int = 1,
    axis_name: str | None = None,
    reduce_dtype: DTypeLike | None = None,
) -> Callable[..., GradResult]:
    """Differentiate a loss in the compute dtype and return its gradients in float32.

    The returned function runs these steps in order:

    1. Cast parameters and batch to the compute dtype.
    2. Run the loss forward and backward. The backward pass starts from the loss scale; this equals
       multiplying the loss by the scale, except that the loss itself cannot overflow.
    3. Convert the gradients to float32 and divide them by the scale.
    4. Test whether all gradients are finite, and adjust the scale.

    The gradients are with respect to the cast parameters: the derivative of the cast is taken to be
    the identity. A float16 loss cannot propagate a derivative above 65,504, so its scale is capped
    at 2^15 (`scaled_by` is the scale that was used).

    With micro-batches, or over the devices of a mesh axis, scaled gradients are converted to
    float32 and accumulated on each device, divided by the number of parts (or by their weight),
    cast to the reduce dtype and summed over the devices. Then they are unscaled and tested once. An
    overflow in any part therefore makes the result non-finite on all devices.

    Args:
      loss_fn: `loss_fn(params, batch, *args, **kwargs)` returns a real scalar, or
        `(scalar, aux)` with `has_aux`. Reduce the loss in float32: cast the model's outputs with
        `policy.cast_to_output` first. The loss is a mean over examples; return a mean over
        anything else, such as tokens, as a `WeightedLoss`.
      policy: an argument of `get_precision`. `Rules`, for a model under
        `jmp_train.flax.apply_policy`, and None, for a loss function under `autocast`, cast nothing.
      has_aux: whether `loss_fn` returns `(loss, aux)`. `aux` is returned unchanged.
      cast_batch: whether to cast the floating leaves of the batch. Set it to False if the batch
        contains regression targets that the compute dtype would round.
      micro_batches: number N of equal parts that the batch's leading axis is split into; part n
        has the examples n, n + N, n + 2 N, .... One compiled body runs the parts in turn, so the
        activations of only one part are in memory. Floating scalars of `aux` are averaged, weighted
        like the loss; other leaves of `aux` get a leading axis of micro-batches. The keyword
        argument `key` is folded with the index of the part. The keyword argument `model_state` is
        passed from part to part, and `aux` is then `(aux, new model state)`. All other arguments
        are passed to each part unchanged.
      axis_name: mesh axis to average over, for a function under `jax.shard_map(...,
        check_vma=False)` whose batch is the share of one device; `make_step(parallel=...)` sets
        that up. The micro-batches of all devices, even if one each, are parts of one batch: `aux`
        and `key` are treated as above, and the floating leaves of a model state are averaged.
      reduce_dtype: dtype of the sum of gradients over the devices: "float32", "bfloat16",
        "float16", or None for the dtype of the gradients, float32 (float64 for float64 parameters).
        bfloat16 halves the bytes and keeps 8 significant bits. float16 keeps 11, but values beyond
        its range become infinite, which the test for finite gradients finds, or zero.

    Returns:
      `grad_fn(params, batch, *args, loss_scale=None, **kwargs) -> GradResult`: a pure function, to
      be called inside jit. Without a `loss_scale`, the loss is not scaled. Further arguments are
      passed to `loss_fn` without casts.

    Raises:
      ValueError: for an unknown policy or reduce dtype, or less than one micro-batch; when traced,
        for a batch that cannot be split into equal micro-batches.
      TypeError: when traced, if `loss_scale` has the wrong type, if the loss is not a real scalar,
        or if a parameter is not floating (a counter or a PRNG key), with the path of the parameter.

    >>> def loss_fn(params, batch):
    ...     return jnp.mean((batch["x"] @ params["w"]).astype(jnp.float32) ** 2)
    >>> grad_fn = jax.jit(value_and_grad(loss_fn, "mixed_float16"))
    >>> params, batch = {"w": jnp.ones((2, 1))}, {"x": jnp.ones((3, 2))}
    >>> result = grad_fn(params, batch, loss_scale=DynamicLossScale(2.0**16))
    >>> float(result.loss), result.grads["w"].dtype, bool(result.finite)
    (4.0, dtype('float32'), False)

    That loss scale was too large for these gradients (4 x 2^16 is above 65,504), so it is halved
    for the next step:

    >>> float(result.loss_scale.loss_scale)
    32768.0

    Source: Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740.
    """
    whole_batch = micro_batches == 1 and axis_name is None
    to_compute = get_precision(policy).cast_to_compute
    micro_batches = check_micro_batches(micro_batches)
    reduce_dtype = check_reduce_dtype(reduce_dtype, axis_name)

    def grad_fn(
        params: PyTree,
        batch: PyTree,
        *args: Any,
        loss_scale: LossScale | None = None,
        **kwargs: Any,
    ) -> GradResult:
        scale = NoOpLossScale() if loss_scale is None else loss_scale
        check_loss_scale(scale)
        _check_params(params)
        cast_params = to_compute(params)

        def run(batch: PyTree, kwargs: dict[str, Any]) -> Part:
            if cast_batch:
                batch = to_compute(batch)

            def compute(params: PyTree) -> tuple[jax.Array, Any]:
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


def _check_params(params: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"parameter {name!r} has dtype {dtype}; expected a floating dtype: keep counters "
                "and PRNG keys out of the parameters"
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


def _fit(loss_scale: LossScale, dtype: DTypeLike) -> LossScale:
    """Cap a dynamic loss scale at the largest power of two of the loss dtype; free for float32."""
    limit = largest_power_of_two(dtype)
    dynamic = isinstance(loss_scale, DynamicLossScale)
    if not dynamic or limit >= largest_power_of_two(jnp.float32):
        return loss_scale
    return dataclasses.replace(loss_scale, loss_scale=jnp.minimum(loss_scale.loss_scale, limit))


def _seed(loss_scale: LossScale, dtype: DTypeLike) -> jax.Array:
    """Return the cotangent that starts the backward pass; a static scale is capped here."""
    scale = loss_scale.loss_scale
    if isinstance(loss_scale, StaticLossScale):
        scale = min(scale, largest_power_of_two(dtype))
    return jnp.asarray(scale, dtype)


def _unscale(grads: PyTree, loss_scale: LossScale, seed: jax.Array) -> PyTree:
    """Divide gradients by the scale as rounded: bfloat16 has 1.1 * 2^16 to three digits only."""
    if isinstance(loss_scale, NoOpLossScale):
        return grads
    return jax.tree.map(lambda g: g / seed.astype(jnp.finfo(g.dtype).dtype), grads)


def _widen(grads: PyTree, params: PyTree) -> PyTree:
    """Cast gradients to float32, or to the dtype of the parameters if that is wider."""
    return jax.tree.map(lambda g, p: g.astype(at_least_float32(jnp.result_type(p))), grads, params)
