"""The train step: a pair of pure functions made from a loss, an optimizer and a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmp_train.optim.fp32_state import fp32_state
from jmp_train.precision.gradients import value_and_grad
from jmp_train.precision.loss_scale import (
    LossScale,
    NoOpLossScale,
    default_loss_scale,
    select_tree,
)
from jmp_train.precision.policy import Policy, get_policy, widen_to_full
from jmp_train.training.state import StepInfo, TrainState


class Stepper(NamedTuple):
    """A train step under a policy: `init` makes the state, `step` and `scan` advance it."""

    init: Callable[..., TrainState]
    """`init(params, *, model_state=None, key=None)`. Copies, so the caller's arrays stay alive."""
    step: jax.stages.Wrapped
    """`step(state, batch) -> (TrainState, StepInfo)`: one step, jitted; the state's buffers are donated."""
    scan: jax.stages.Wrapped
    """`scan(state, batches)`: a step for each entry of the batches' leading axis in one dispatch,
    jitted and donated; the info's leaves get that leading axis."""
    skips_nonfinite: bool
    """Whether steps with non-finite gradients are skipped."""


def make_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    policy: str | Policy | None = "float32",
    *,
    loss_scale: LossScale | None = None,
    skip_nonfinite: bool | None = None,
    grad_norm: bool = False,
    cast_batch: bool = True,
) -> Stepper:
    """Makes the train step of a loss under a precision policy.

    Forward and backward pass run in the policy's compute dtype, on parameters cast from its
    parameter dtype; gradients are unscaled, checked, clipped (where the optimizer clips) and
    applied in float32, and the optimizer's state is float32 whatever the parameters are.

    Where a loss scale is in use, a step with a non-finite gradient changes nothing but the scale
    and the counters of steps: parameters, optimizer state (its schedule's count too) and model
    state are bitwise what they were.

    Args:
      loss_fn: `loss_fn(params, batch)` returns `loss` or `(loss, aux)`. With a model state it is
        called with `model_state=` too and returns `(loss, aux, new_model_state)`; with a key, with
        `key=`, a fresh one each step. The loss is a real scalar; reduce it in float32: cast the
        model's output to float32 first, or with `policy.cast_to_output` where that is float32.
      optimizer: any Optax transformation; it need not know of precision. For parameters narrower
        than float32, `master_weights`, `bf16_remainder`, `stochastic_rounding` or `kahan` around
        one keeps updates that are too small for them.
      policy: a `Policy` or a string for `get_policy`. None casts neither parameters nor batch, for
        a loss function that does so itself: one under `autocast`, or with a model under
        `jmp_train.flax.apply_policy`.
      loss_scale: the first state of the loss scale; by default `default_loss_scale(policy)`:
        dynamic where the policy computes in float16, else none.
      skip_nonfinite: whether steps with non-finite gradients are skipped; by default only where
        there is a loss scale, because the check reads every gradient.
      grad_norm: whether to compute the gradients' global norm.
      cast_batch: whether the batch's floating leaves are cast to the compute dtype.

    Returns:
      A `Stepper`. With the float32 policy and the defaults, its step compiles to what one would
      write by hand around `jax.value_and_grad` and `optax.apply_updates`.

    Raises:
      ValueError: for an unknown policy.
      TypeError: when traced, for a loss that is not a real scalar, or a parameter that is not
        floating.

    >>> def loss_fn(params, batch):
    ...     return jnp.mean((batch["x"] @ params["w"] - batch["y"]).astype(jnp.float32) ** 2)
    >>> stepper = make_step(loss_fn, optax.adam(0.1), "mixed_float16")
    >>> state = stepper.init({"w": jnp.zeros(2)})
    >>> batch = {"x": jnp.eye(2), "y": jnp.array([1.0, -1.0])}
    >>> for _ in range(3):
    ...     state, info = stepper.step(state, batch)
    >>> state.params["w"].dtype, round(float(info.loss), 3), float(info.loss_scale)
    (dtype('float32'), 0.81, 32768.0)
    >>> int(state.skipped)  # a scale of 65,536 was too large for a gradient of 1
    1
    """
    policy = None if policy is None else get_policy(policy)
    first_scale = loss_scale
    if first_scale is None:
        first_scale = NoOpLossScale() if policy is None else default_loss_scale(policy)
    if skip_nonfinite is None:
        skip_nonfinite = not isinstance(first_scale, NoOpLossScale)
    optimizer = fp32_state(optimizer)
    grad_fn = value_and_grad(_loss_and_rest(loss_fn), policy, has_aux=True, cast_batch=cast_batch)

    def init(params: Any, *, model_state: Any = None, key: Any = None) -> TrainState:
        params = params if policy is None else policy.cast_to_param(params)
        params = jax.tree.map(_own, params)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=jax.tree.map(_own, optimizer.init(params)),
            model_state=jax.tree.map(_own, widen_to_full(model_state)),
            loss_scale=jax.tree.map(_own, first_scale),
            skipped=jnp.zeros((), jnp.int32),
            skipped_in_row=jnp.zeros((), jnp.int32),
            key=None if key is None else _own(key),
        )

    def step(state: TrainState, batch: Any) -> tuple[TrainState, StepInfo]:
        extras = {} if state.model_state is None else {"model_state": state.model_state}
        if state.key is not None:
            extras["key"] = jax.random.fold_in(state.key, state.step)
        result = grad_fn(state.params, batch, loss_scale=state.loss_scale, **extras)
        aux, model_state = result.aux
        updates, opt_state = optimizer.update(result.grads, state.opt_state, state.params)
        kept = (state.params, state.opt_state, state.model_state)
        moved = (
            optax.apply_updates(state.params, updates),
            opt_state,
            jax.tree.map(lambda new, old: new.astype(old.dtype), model_state, state.model_state),
        )
        skipped, skipped_in_row = state.skipped, state.skipped_in_row
        if skip_nonfinite:
            moved = select_tree(result.finite, moved, kept)
            skipped = skipped + ~result.finite
            skipped_in_row = jnp.where(result.finite, 0, skipped_in_row + 1)
        params, opt_state, model_state = moved
        scale = None
        if not isinstance(state.loss_scale, NoOpLossScale):
            scale = jnp.asarray(state.loss_scale.loss_scale, jnp.float32)
        info = StepInfo(
            loss=result.loss,
            aux=aux,
            finite=result.finite if skip_nonfinite else None,
            grad_norm=optax.tree.norm(result.grads) if grad_norm else None,
            loss_scale=scale,
        )
        state = TrainState(
            state.step + 1,
            params,
            opt_state,
            model_state,
            result.loss_scale,
            skipped,
            skipped_in_row,
            state.key,
        )
        return state, info

    return Stepper(
        init=init,
        step=jax.jit(step, donate_argnums=0),
        scan=jax.jit(lambda state, batches: jax.lax.scan(step, state, batches), donate_argnums=0),
        skips_nonfinite=skip_nonfinite,
    )


def _own(x: Any) -> jax.Array:
    """A copy that may be donated, strongly typed: a weak type would end at the first step and with
    it the compiled program's fit."""
    x = jnp.asarray(x)
    return jnp.array(x, dtype=x.dtype, copy=True)


def _loss_and_rest(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The user's `loss`, `(loss, aux)` or `(loss, aux, model_state)` in one shape."""

    def normalised(params: Any, batch: Any, **extras: Any) -> Any:
        out = loss_fn(params, batch, **extras)
        out = out if isinstance(out, tuple) else (out,)
        expected = "(loss, aux, model_state)" if "model_state" in extras else "loss or (loss, aux)"
        if len(out) > 3 or (len(out) == 3) != ("model_state" in extras):
            raise TypeError(f"the loss function returned {len(out)} values; expected {expected}")
        loss, aux, model_state = (*out, None, None)[:3]
        return loss, (aux, model_state)

    return normalised
