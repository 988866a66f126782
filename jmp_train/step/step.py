"""The train step: a pair of pure functions made from a loss, an optimizer and a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from jmp_train.loss_scales.states import LossScale, NoOpLossScale
from jmp_train.optim.fp32_state import fp32_state
from jmp_train.optim.narrow_parameters import apply_updates
from jmp_train.policy.policy import Policy
from jmp_train.policy.precision import Precision, get_precision
from jmp_train.policy.rules import Rules
from jmp_train.step.accumulation import as_before
from jmp_train.step.arguments import (
    check_key,
    check_make_step,
    check_scaled_once,
    check_state,
    explain_missing_arguments,
)
from jmp_train.step.devices import DataParallel, over_devices, replicate, with_parameters
from jmp_train.step.donation import Donating
from jmp_train.step.gradients import GradResult, value_and_grad
from jmp_train.step.state import LastSkip, StepInfo, TrainState
from jmp_train.tree import nonfinite_leaves, select_tree, widen_to_full

T = TypeVar("T")


class _Kept(NamedTuple):
    """What a skipped step leaves as it is, and what counts it; fields of the `TrainState`."""

    params: Any
    opt_state: Any
    model_state: Any
    ema: Any
    skipped: jax.Array
    skipped_in_row: jax.Array
    last_skip: Any


class Stepper(NamedTuple):
    """A train step under a policy: `init` makes the state, `step` and `scan` advance it."""

    init: Callable[..., TrainState]
    """`init(params, *, model_state=None, key=None)`. Copies, so the caller's arrays stay alive.
    Counters and the loss scale are replicated over the devices that the parameters are sharded over."""
    step: jax.stages.Wrapped
    """`step(state, batch) -> (TrainState, StepInfo)`: one step, jitted; the state's buffers are donated."""
    pure_step: Callable[[TrainState, Any], tuple[TrainState, StepInfo]]
    """The function that `step` jits, without jit and donation: to differentiate through steps (not
    with the wrappers for 16-bit parameters), to `vmap` over states, or to jit in another way."""
    scan: jax.stages.Wrapped
    """`scan(state, batches)`: a step for each entry of the batches' leading axis in one dispatch,
    jitted and donated; the info's leaves get that leading axis."""


def make_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    policy: str | Policy | Rules | Precision | None = "float32",
    *,
    loss_scale: LossScale | None = None,
    skip_nonfinite: bool | None = None,
    grad_norm: bool = False,
    ema_decay: float | None = None,
    cast_batch: bool = True,
    micro_batches: int = 1,
    parallel: DataParallel | None = None,
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
        called with `model_state=` too and returns `(loss, aux, new_model_state)`, of the same
        structure and shapes; with a key, with
        `key=`, a fresh one each step. The loss is a real scalar; reduce it in float32: cast the
        model's output to float32 first, or with `policy.cast_to_output` where that is float32. A
        mean over anything but examples, over tokens say, is returned as a `WeightedLoss`.
      optimizer: any Optax transformation; it need not know of precision. Its update gets the extra
        arguments `value` (the loss), `grad` (the gradients, unscaled) and `value_fn` (the loss on
        this batch as a differentiable function of the parameters), so `reduce_on_plateau`,
        `polyak_sgd`, `momo` and `lbfgs` work. For parameters narrower
        than float32, `master_weights`, `bf16_remainder`, `stochastic_rounding` or `kahan` around
        one keeps updates that are too small for them. Not one in `loss_scaling`: the step scales
        the loss itself.
      policy: what `get_precision` takes: a string, a `Policy`, `Rules` or a `Precision`. `Rules` are
        those of a model under `jmp_train.flax.apply_policy`, which casts its own parameters and
        inputs; they give the loss scale. None is for a loss function under `autocast`: it casts
        nothing, and there is no loss scale but the one given.
      loss_scale: the first state of the loss scale; by default `default_loss_scale(policy)`:
        dynamic where the policy or a rule computes in float16, else none.
      skip_nonfinite: whether steps with non-finite gradients, or after which the model state would
        no longer be finite, are skipped; by default only where there is a loss scale, because the
        check reads every gradient.
      grad_norm: whether to compute the gradients' global norm.
      ema_decay: decay of an exponential moving average of the parameters, kept in float32 in
        `state.ema` and there for evaluation (`state.eval_params`); None keeps none. After n updates
        the decay is at most (1 + n) / (10 + n), so that the first parameters are soon forgotten,
        as in TensorFlow's ExponentialMovingAverage. A skipped step leaves it as it is.
      cast_batch: whether the batch's floating leaves are cast to the compute dtype.
      micro_batches: the number N of equal parts of a batch that run one after the other, with the
        memory of one; their gradients are accumulated in float32, then unscaled, checked and
        clipped once. Part n has the examples n, n + N, n + 2 N, ..., so that the parts of a sharded
        batch are sharded alike. Each gets its own key and the model state that the one before returned. In
        the info's `aux`, floating scalars are their mean; other leaves get a leading axis.
      parallel: the devices that share each batch; see `DataParallel`. Each device takes its
        micro-batches as above. None runs where the state and the batch lie.

    Returns:
      A `Stepper`. With the float32 policy and the defaults, its step compiles to what one would
      write by hand around `jax.value_and_grad` and `optax.apply_updates`.

    Raises:
      ValueError: for an unknown policy, reduce dtype or mesh axis, less than one micro-batch, and an EMA
        decay outside 0 to 1; from `init`, for an optimizer in `loss_scaling`;
        when traced, for a batch that does not split into equal parts;
        from `step` and `scan`, for a state that an earlier call has donated.
      TypeError: for a loss function, an optimizer or a loss scale that is none, and from `init` for
        a key that is none; when traced, for a state that is none, a loss that is not a real scalar,
        a parameter that is not floating, a new model state of another structure, shape or kind of
        number than the one before, by its path, and an optimizer that needs further arguments.

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
    check_make_step(loss_fn, optimizer, loss_scale)
    precision = get_precision(policy)
    first_scale = precision.default_loss_scale() if loss_scale is None else loss_scale
    if skip_nonfinite is None:
        skip_nonfinite = not isinstance(first_scale, NoOpLossScale)
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ValueError(f"ema_decay is {ema_decay}; expected 0 < ema_decay < 1, or None")
    optimizer = fp32_state(optimizer)
    grads = step_gradients(
        loss_fn,
        precision,
        cast_batch=cast_batch,
        micro_batches=micro_batches,
        parallel=parallel,
    )

    def init(params: Any, *, model_state: Any = None, key: Any = None) -> TrainState:
        check_key(key)
        params = jax.tree.map(_own, params)  # arrays, so that a cast leaves no Python number out
        params = precision.cast_to_param(params)
        model_state = jax.tree.map(_own, widen_to_full(model_state))
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=jax.tree.map(_own, optimizer.init(params)),
            model_state=model_state,
            ema=None if ema_decay is None else jax.tree.map(_own, widen_to_full(params)),
            loss_scale=jax.tree.map(_own, first_scale),
            skipped=jnp.zeros((), jnp.int32),
            skipped_in_row=jnp.zeros((), jnp.int32),
            last_skip=no_skip(params, model_state) if skip_nonfinite else None,
            key=None if key is None else _own(key),
        )
        check_scaled_once(state.opt_state)
        return with_parameters(state) if parallel is None else replicate(state, parallel.mesh)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, StepInfo]:
        result = grads(state, batch)
        aux, new_model_state = result.aux
        new_model_state = as_before(new_model_state, state.model_state)
        finite = result.finite
        if skip_nonfinite and state.model_state is not None:
            finite &= ~_became_nonfinite(new_model_state, state.model_state).any()

        def move(kept: _Kept) -> _Kept:
            with explain_missing_arguments():
                updates, opt_state = optimizer.update(
                    result.grads,
                    kept.opt_state,
                    kept.params,
                    value=result.loss,
                    grad=result.grads,
                    value_fn=_loss_of_parameters(grads, state, batch),
                )
            params = apply_updates(kept.params, updates)
            ema = kept.ema
            if ema_decay is not None:
                taken = (state.step - kept.skipped).astype(jnp.float32)
                rate = 1 - jnp.minimum(ema_decay, (1 + taken) / (10 + taken))
                ema = jax.tree.map(
                    lambda e, p: e + rate.astype(e.real.dtype) * (p.astype(e.dtype) - e),
                    ema,
                    params,
                )
            return kept._replace(
                params=params,
                opt_state=opt_state,
                model_state=new_model_state,
                ema=ema,
                skipped_in_row=jnp.zeros_like(kept.skipped_in_row),
            )

        def skip(kept: _Kept) -> _Kept:
            bad = nonfinite_leaves(result.grads)
            if state.model_state is not None:
                became = _became_nonfinite(new_model_state, state.model_state)
                bad = jnp.concatenate([bad, became])
            return kept._replace(
                skipped=kept.skipped + 1,
                skipped_in_row=kept.skipped_in_row + 1,
                last_skip=LastSkip(state.step + 1, bad),
            )

        kept = _Kept(*(getattr(state, field) for field in _Kept._fields))
        if skip_nonfinite:
            kept = _move_or_skip(finite, move, skip, kept)
        else:
            kept = move(kept)._replace(skipped_in_row=state.skipped_in_row)
        info = StepInfo(
            loss=result.loss,
            aux=aux,
            finite=finite if skip_nonfinite else None,
            grad_norm=optax.tree.norm(result.grads) if grad_norm else None,
            loss_scale=result.scaled_by,
        )
        state = state._replace(step=state.step + 1, loss_scale=result.loss_scale, **kept._asdict())
        return state, info

    def scan(state: TrainState, batches: Any) -> tuple[TrainState, StepInfo]:
        check_state(state)
        return jax.lax.scan(step, state, batches)

    return Stepper(init=init, step=Donating(step), pure_step=step, scan=Donating(scan))


def step_gradients(
    loss_fn: Callable[..., Any],
    policy: str | Policy | Rules | Precision | None,
    *,
    cast_batch: bool = True,
    micro_batches: int = 1,
    parallel: DataParallel | None = None,
) -> Callable[[TrainState, Any], GradResult]:
    """Make `grads(state, batch)`: loss and gradients as a step forms them, not jitted.

    A skipped step has changed nothing, so `first_nonfinite` of this function tells what happened
    in it. The arguments are those of `make_step`.
    """
    grad_fn = value_and_grad(
        _loss_and_rest(loss_fn),
        policy,
        has_aux=True,
        cast_batch=cast_batch,
        micro_batches=micro_batches,
        axis_name=None if parallel is None else parallel.axis_name,
        reduce_dtype=None if parallel is None else parallel.reduce_dtype,
    )
    if parallel is not None:
        grad_fn = over_devices(grad_fn, parallel, micro_batches)

    def grads(state: TrainState, batch: Any) -> GradResult:
        check_state(state)
        extras = {} if state.model_state is None else {"model_state": state.model_state}
        if state.key is not None:
            extras["key"] = jax.random.fold_in(state.key, state.step)
        return grad_fn(state.params, batch, loss_scale=state.loss_scale, **extras)

    return grads


def _move_or_skip(finite: jax.Array, move: Callable[[T], T], skip: Callable[[T], T], kept: T) -> T:
    """`move(kept)` where `finite` holds, else `skip(kept)`; each platform in its own cheapest way.

    On a CPU a select makes XLA form the new state beside the old and pass over both once more:
    with adamw and 10 M parameters it takes 1.7 to 2.5 times the step that never skips, a cond 1.1 to
    1.3 times (benchmarks/bench_skipping.py). Compiled for a TPU, a select adds no traffic to that step. On a
    GPU the host has to read a cond's condition before it can launch a branch, at every step.
    """
    return jax.lax.platform_dependent(
        finite,
        kept,
        cpu=lambda finite, kept: jax.lax.cond(finite, move, skip, kept),
        default=lambda finite, kept: select_tree(finite, move(kept), skip(kept)),
    )


def no_skip(params: Any, model_state: Any) -> LastSkip:
    """What a state remembers of skipped steps before there was one."""
    leaves = len(jax.tree.leaves((params, model_state)))
    return LastSkip(jnp.zeros((), jnp.int32), jnp.zeros(leaves, jnp.bool_))


def _became_nonfinite(new: Any, old: Any) -> jax.Array:
    """Which leaves of a model state were finite and are not any more; shape=(leaves,), bool.

    A state may hold infinities from the start: a smallest loss so far, or the mask of a cache.
    """
    return nonfinite_leaves(new) & ~nonfinite_leaves(old)


def _loss_of_parameters(
    grads: Callable[[TrainState, Any], GradResult], state: TrainState, batch: Any
) -> Callable[[Any], jax.Array]:
    """The loss of one step as a function of the parameters; differentiated, it gives the step's own
    gradients, formed under the loss scale and unscaled. Not traced unless it is called."""

    @jax.custom_vjp
    def loss(params: Any) -> jax.Array:
        return grads(state._replace(params=params), batch).loss

    def forward(params: Any) -> tuple[jax.Array, Any]:
        result = grads(state._replace(params=params), batch)
        return result.loss, jax.tree.map(lambda g, p: g.astype(p.dtype), result.grads, params)

    def backward(gradients: Any, cotangent: jax.Array) -> tuple[Any]:
        return (jax.tree.map(lambda g: g * cotangent.astype(g.real.dtype), gradients),)

    loss.defvjp(forward, backward)
    return loss


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
