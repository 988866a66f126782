"""Loss scaling as an Optax transformation, for custom training loops."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmp_train.loss_scales.states import DynamicLossScale, LossScale, check_loss_scale
from jmp_train.optim.fp32_state import fp32_state
from jmp_train.optim.narrow_parameters import NarrowParameters
from jmp_train.tree import all_finite, select_tree
from jmp_train.types import PyTree


class LossScalingState(NamedTuple):
    """State of `loss_scaling`."""

    loss_scale: PyTree  # LossScale that multiplies the next loss
    skipped: jax.Array  # shape=(), int32: number of skipped steps
    skipped_in_row: jax.Array  # shape=(), int32: skipped steps since the last step taken
    inner: PyTree  # state of the inner optimizer, float32


def loss_scaling(
    optimizer: optax.GradientTransformation, loss_scale: LossScale | None = None
) -> optax.GradientTransformationExtraArgs:
    """Make an optimizer accept the gradients of a scaled loss.

    `update` divides the gradients by the loss scale in float32, checks that all are finite, runs
    the optimizer and adjusts the scale. A step with a non-finite gradient is skipped and counted:
    the updates leave the parameters unchanged, and the optimizer's state, its counts included,
    stays the same bit for bit. `scale_loss` multiplies the loss by the scale in the state.

    Put every other transformation inside, gradient clipping, schedules and `master_weights`
    included: `loss_scaling(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)))`. A
    transformation chained after `loss_scaling` also acts on skipped steps (weight decay would still
    decay). A transformation chained before it sees scaled gradients.

    Around `optax.MultiSteps`, each micro-batch is unscaled and checked separately, and a non-finite
    one is left out. Do not put `loss_scaling` inside `optax.MultiSteps`, which clears its sum by
    multiplying it by 0: after one overflow the sum would stay NaN.

    `optax.apply_if_finite` also skips non-finite steps. It does not unscale, it applies a
    non-finite update after a given number in a row, and its updates of +0.0 turn a parameter of
    -0.0 into +0.0.

    Args:
      optimizer: any Optax transformation. Its state is float32, as under `fp32_state`.
      loss_scale: first state of the loss scale; `DynamicLossScale(2.0**16)` when None.
        `NoOpLossScale()` only checks for non-finite gradients.

    Returns:
      A transformation with the same arguments and a `LossScalingState`.

    Raises:
      TypeError: if `loss_scale` is not a loss scale.

    >>> optimizer = loss_scaling(optax.sgd(1.0), DynamicLossScale(2.0**16))
    >>> params = jnp.float32(3.0)
    >>> state = optimizer.init(params)
    >>> def scaled_loss(params, state):
    ...     return scale_loss(params.astype(jnp.float16) ** 2, state)
    >>> for _ in range(4):  # 6 * 2^16, 6 * 2^15, 6 * 2^14 overflow float16, and 6 * 2^13 does not
    ...     grads = jax.grad(scaled_loss)(params, state)
    ...     updates, state = optimizer.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> float(params), int(state.skipped), float(state.loss_scale.loss_scale)
    (-3.0, 3, 8192.0)

    Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2.
    """
    if loss_scale is not None:
        check_loss_scale(loss_scale)
    inner = fp32_state(optimizer)
    first = DynamicLossScale(2.0**16) if loss_scale is None else loss_scale

    def init(params: PyTree) -> LossScalingState:
        return LossScalingState(
            loss_scale=jax.tree.map(lambda x: jnp.array(x, dtype=x.dtype), first),
            skipped=jnp.zeros((), jnp.int32),
            skipped_in_row=jnp.zeros((), jnp.int32),
            inner=inner.init(params),
        )

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
    ) -> tuple[Any, LossScalingState]:
        grads = state.loss_scale.unscale(updates)
        finite = all_finite(grads)
        updates, inner_state = inner.update(grads, state.inner, params, **extra_args)
        # Selected: a multiplication by 0 would turn an infinity into a NaN.
        updates, inner_state = select_tree(
            finite, (updates, inner_state), (_no_updates(updates), state.inner)
        )
        return updates, LossScalingState(
            loss_scale=state.loss_scale.adjust(finite),
            skipped=jnp.where(finite, state.skipped, optax.safe_increment(state.skipped)),
            skipped_in_row=jnp.where(finite, 0, optax.safe_increment(state.skipped_in_row)),
            inner=inner_state,
        )

    narrow = isinstance(optimizer, NarrowParameters)
    return (NarrowParameters if narrow else optax.GradientTransformationExtraArgs)(init, update)


def scale_loss(loss: Any, opt_state: PyTree) -> PyTree:
    """Multiply a loss by the loss scale in an optimizer's state, in float32 or wider.

    Args:
      loss: array of any shape. Reduce the loss in float32, because a float16 loss cannot pass on a
        derivative above 65,504.
      opt_state: optimizer state with one `LossScalingState` at any depth (`optax.chain`,
        `optax.partition`). `optax.tree.get(opt_state, "LossScalingState")` returns it.

    Raises:
      ValueError: if the state has no `LossScalingState`, or more than one.

    >>> optimizer = optax.chain(loss_scaling(optax.adam(1e-3), DynamicLossScale(2.0**10)))
    >>> state = optimizer.init(jnp.zeros(3))
    >>> scale_loss(jnp.float16(3.0), state)
    Array(3072., dtype=float32)
    >>> int(optax.tree.get(state, "LossScalingState").skipped)
    0
    """
    found = scales_of(opt_state)
    if len(found) != 1:
        raise ValueError(
            f"the optimizer's state has {len(found)} loss scales; expected one: put loss_scaling "
            "around the whole optimizer"
        )
    return found[0].scale(loss)


def scales_of(opt_state: PyTree) -> list[LossScale]:
    """Return the loss scales in an optimizer's state, at any depth."""
    found = optax.tree.get_all_with_path(opt_state, LossScalingState.__name__)
    return [state.loss_scale for _, state in found]


def _no_updates(updates: PyTree) -> PyTree:
    """Return updates that change nothing: -0.0 for floating leaves, 0 for a `BitUpdate`.

    x + -0.0 is x for every x, whereas -0.0 + 0.0 is +0.0.
    """
    return jax.tree.map(lambda update: -jnp.zeros_like(update), updates)
