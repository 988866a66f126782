"""The train step: pure functions made from a loss, an optimizer and a policy."""

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
from jmp_train.sharding.sharded import Sharded
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
from jmp_train.types import DTypeLike, Function, Key, PyTree

T = TypeVar("T")


class _Carried(NamedTuple):
    """Fields of a `TrainState` that differ between a step taken and a skipped step."""

    params: PyTree
    opt_state: PyTree
    model_state: PyTree
    ema: PyTree
    skipped: jax.Array
    skipped_in_row: jax.Array
    last_skip: LastSkip | None


class Stepper(NamedTuple):
    """A train step: `init` makes the state, `step` and `scan` advance it."""

    init: Callable[..., TrainState]
    """`init(params, *, model_state=None, key=None) -> TrainState`. The arrays are copied, so that
    donation does not delete the caller's. Counters and the loss scale are replicated over the
    devices of sharded parameters."""
    step: jax.stages.Wrapped
    """`step(state, batch) -> (TrainState, StepInfo)`: one step, jitted; `state` is donated."""
    pure_step: Callable[[TrainState, PyTree], tuple[TrainState, StepInfo]]
    """The function inside `step`, without jit and donation: to differentiate through steps (not
    with the wrappers for 16-bit parameters), to `vmap` over states, or to jit with other options."""
    scan: jax.stages.Wrapped
    """`scan(state, batches) -> (TrainState, StepInfo)`: one step for each entry of the leading axis
    of `batches`, in one dispatch, jitted; `state` is donated. Leaves of the info get that axis."""


def make_step(
    loss_fn: Function,
    optimizer: optax.GradientTransformation,
    policy: str | Policy | Rules | Precision | None = "float32",
    *,
    loss_scale: LossScale | None = None,
    skip_nonfinite: bool | None = None,
    grad_norm: bool = False,
    ema_decay: float | None = None,
    cast_batch: bool = True,
    micro_batches: int = 1,
    parallel: DataParallel | Sharded | None = None,
) -> Stepper:
    """Make the train step of a loss under a precision policy.

    The forward and backward pass run in the policy's compute dtype, on parameters that are stored
    in its parameter dtype. Gradients are unscaled, checked, clipped (if the optimizer clips) and
    applied in float32. The optimizer state is float32 for every dtype of the parameters.

    With a loss scale, a step with a non-finite gradient is skipped: it changes only the loss scale
    and the counters of steps. Parameters, optimizer state (including the schedule's count) and
    model state stay bitwise the same.

    Args:
      loss_fn: `loss_fn(params, batch)` returns `loss` or `(loss, aux)`. With a model state,
        `loss_fn` is called with `model_state=` too and returns `(loss, aux, new_model_state)`, the
        new state of the same structure and shapes. With a key, it is called with `key=`, a fresh
        key each step. The loss is a real scalar. Reduce it in float32: cast the model's output to
        float32 first, or with `policy.cast_to_output` if the output dtype is float32. Return a mean
        over anything but examples, such as tokens, as a `WeightedLoss`.
      optimizer: any Optax transformation; it does not have to handle precision. Its update gets the
        extra arguments `value` (the loss), `grad` (the unscaled gradients) and `value_fn` (the loss
        on this batch as a differentiable function of the parameters), so `reduce_on_plateau`,
        `polyak_sgd`, `momo` and `lbfgs` work. For parameters narrower than float32, wrap it in
        `master_weights`, `bf16_remainder`, `stochastic_rounding` or `kahan` to preserve updates
        that are too small for the parameter dtype. Do not wrap it in `loss_scaling`: the step
        scales the loss itself.
      policy: an argument of `get_precision`: a string, a `Policy`, `Rules` or a `Precision`.
        `Rules` are those of a model under `jmp_train.flax.apply_policy`, which casts its own
        parameters and inputs; they determine the default loss scale. None is for a loss function
        under `autocast`: it casts nothing, and its default is no loss scale.
      loss_scale: initial state of the loss scale; by default `default_loss_scale(policy)`:
        dynamic if the policy or a rule uses float16, else none.
      skip_nonfinite: whether to skip steps with non-finite gradients and steps that would make the
        model state non-finite. By default only with a loss scale, because the check reads every
        gradient.
      grad_norm: whether to compute the global norm of the gradients.
      ema_decay: decay of an exponential moving average of the parameters, stored in float32 in
        `state.ema` and evaluated as `state.eval_params`; None for no average. After n updates the
        decay is at most (1 + n) / (10 + n), so that the initial parameters soon lose their weight,
        as in TensorFlow's ExponentialMovingAverage. A skipped step does not change the average.
      cast_batch: whether to cast the floating leaves of the batch to the compute dtype.
      micro_batches: number N of equal parts of a batch, which run in turn with the memory of one.
        Their gradients are accumulated in float32, then unscaled, checked and clipped once. Part n
        has the examples n, n + N, n + 2 N, ..., so that the parts of a sharded batch have its
        sharding. Each part gets its own key and the model state of the previous part. In the info's
        `aux`, floating scalars are averaged; other leaves get a leading axis.
      parallel: devices that share the work. `DataParallel`: each computes the loss of its share of the
        batch on its own, with a copy of the state, and gradients are summed in a chosen dtype.
        `Sharded`: parameters and state are split too, and the program is that of the whole batch. None
        runs the step on the devices of the state and the batch.

    Returns:
      A `Stepper`. With the float32 policy and the defaults, its step compiles to the same program
      as a step written by hand with `jax.value_and_grad` and `optax.apply_updates`.

    Raises:
      ValueError: for an unknown policy, reduce dtype or mesh axis, less than one micro-batch, or an
        EMA decay outside 0 to 1; from `init`, for an optimizer in `loss_scaling`; when traced, for
        a batch that does not split into equal parts; from `step` and `scan`, for a state that was
        donated to an earlier call.
      TypeError: if `loss_fn` is not callable, or if `optimizer` or `loss_scale` has the wrong type;
        from `init`, if `key` is not a PRNG key; when traced, if the state is not a `TrainState`,
        the loss is not a real scalar, a parameter is not floating, the new model state differs in
        structure, shape or kind of dtype, or the optimizer needs further arguments.

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
    check_make_step(loss_fn, optimizer, loss_scale, parallel)
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

    def init(params: PyTree, *, model_state: PyTree = None, key: Key | None = None) -> TrainState:
        check_key(key)
        params = jax.tree.map(_own, params)  # arrays, because a cast ignores Python numbers
        params = precision.cast_to_param(params)
        if not isinstance(parallel, Sharded):
            state = whole_state(params, model_state, key)
            return with_parameters(state) if parallel is None else replicate(state, parallel.mesh)
        # In one program, whose results are split from the start.
        params = jax.device_put(params, parallel.shardings(params))
        model_state, key = parallel.replicate((model_state, key))
        made = jax.eval_shape(whole_state, params, model_state, key)
        places = parallel.follow(made, made.params)
        return jax.jit(whole_state, out_shardings=places)(params, model_state, key)

    def whole_state(params: PyTree, model_state: PyTree, key: Key | None) -> TrainState:
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
        return state

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, StepInfo]:
        result = grads(state, batch)
        aux, new_model_state = result.aux
        new_model_state = as_before(new_model_state, state.model_state)
        finite = result.finite
        if skip_nonfinite and state.model_state is not None:
            finite &= ~_became_nonfinite(new_model_state, state.model_state).any()

        def move(carried: _Carried) -> _Carried:
            with explain_missing_arguments():
                updates, opt_state = optimizer.update(
                    result.grads,
                    carried.opt_state,
                    carried.params,
                    value=result.loss,
                    grad=result.grads,
                    value_fn=_loss_of_parameters(grads, state, batch),
                )
            params = apply_updates(carried.params, updates)
            ema = carried.ema
            if ema_decay is not None:
                taken = (state.step - carried.skipped).astype(jnp.float32)
                rate = 1 - jnp.minimum(ema_decay, (1 + taken) / (10 + taken))
                ema = jax.tree.map(
                    lambda e, p: e + rate.astype(e.real.dtype) * (_as_stored(p, e.dtype) - e),
                    ema,
                    params,
                )
            return carried._replace(
                params=params,
                opt_state=opt_state,
                model_state=new_model_state,
                ema=ema,
                skipped_in_row=jnp.zeros_like(carried.skipped_in_row),
            )

        def skip(carried: _Carried) -> _Carried:
            bad = nonfinite_leaves(result.grads)
            if state.model_state is not None:
                became = _became_nonfinite(new_model_state, state.model_state)
                bad = jnp.concatenate([bad, became])
            return carried._replace(
                skipped=carried.skipped + 1,
                skipped_in_row=carried.skipped_in_row + 1,
                last_skip=LastSkip(state.step + 1, bad),
            )

        carried = _Carried(*(getattr(state, field) for field in _Carried._fields))
        if skip_nonfinite:
            carried = _move_or_skip(finite, move, skip, carried)
        else:
            carried = move(carried)._replace(skipped_in_row=state.skipped_in_row)
        info = StepInfo(
            loss=result.loss,
            aux=aux,
            finite=finite if skip_nonfinite else None,
            grad_norm=optax.tree.norm(result.grads) if grad_norm else None,
            loss_scale=result.scaled_by,
        )
        state = state._replace(
            step=state.step + 1, loss_scale=result.loss_scale, **carried._asdict()
        )
        return state, info

    def scan(state: TrainState, batches: PyTree) -> tuple[TrainState, StepInfo]:
        check_state(state)
        return jax.lax.scan(step, state, batches)

    return Stepper(init=init, step=Donating(step), pure_step=step, scan=Donating(scan))


def step_gradients(
    loss_fn: Function,
    policy: str | Policy | Rules | Precision | None,
    *,
    cast_batch: bool = True,
    micro_batches: int = 1,
    parallel: DataParallel | Sharded | None = None,
) -> Callable[[TrainState, PyTree], GradResult]:
    """Make `grads(state, batch)`: the loss and gradients of a step, not jitted.

    A skipped step does not change the parameters, so `first_nonfinite` of this function can explain
    the step afterwards. The arguments are those of `make_step`.
    """
    manual = parallel if isinstance(parallel, DataParallel) else None
    sharded = parallel if isinstance(parallel, Sharded) else None
    if (
        sharded is not None
    ):  # casts come before the gathers, and sums of gradients before their casts
        loss_fn = sharded.gathering(_casting(loss_fn, get_precision(policy), cast_batch))
        policy, cast_batch = None, False
    grad_fn = value_and_grad(
        _loss_and_rest(loss_fn),
        policy,
        has_aux=True,
        cast_batch=cast_batch,
        micro_batches=micro_batches,
        axis_name=None if manual is None else manual.axis_name,
        reduce_dtype=None if manual is None else manual.reduce_dtype,
    )
    if manual is not None:
        grad_fn = over_devices(grad_fn, manual, micro_batches)

    def grads(state: TrainState, batch: PyTree) -> GradResult:
        check_state(state)
        extras = {} if state.model_state is None else {"model_state": state.model_state}
        if state.key is not None:
            extras["key"] = jax.random.fold_in(state.key, state.step)
        if sharded is not None:
            batch = sharded.split(batch, micro_batches)
        return grad_fn(state.params, batch, loss_scale=state.loss_scale, **extras)

    return grads


def _casting(loss_fn: Function, precision: Precision, cast_batch: bool) -> Function:
    """Return a loss of parameters and a batch that are not cast yet."""

    def cast(params: PyTree, batch: PyTree, **kwargs: Any) -> Any:
        to_compute = precision.cast_to_compute
        return loss_fn(to_compute(params), to_compute(batch) if cast_batch else batch, **kwargs)

    return cast


def _move_or_skip(
    finite: jax.Array, move: Callable[[T], T], skip: Callable[[T], T], carried: T
) -> T:
    """Return `move(carried)` if `finite`, else `skip(carried)`; a cond on CPU, a select elsewhere.

    On a CPU, a select makes XLA write the new state beside the old and read both again: with adamw
    and 10 M parameters, a step with a select takes 1.7 to 2.5 times as long as a step that never
    skips, and a step with a cond 1.1 to 1.3 times (benchmarks/bench_skipping.py). Compiled for a
    TPU, a select adds no memory traffic. On a GPU, the host would have to read the condition of a
    cond at every step before it could launch a branch.
    """
    return jax.lax.platform_dependent(
        finite,
        carried,
        cpu=lambda finite, carried: jax.lax.cond(finite, move, skip, carried),
        default=lambda finite, carried: select_tree(finite, move(carried), skip(carried)),
    )


def no_skip(params: PyTree, model_state: PyTree) -> LastSkip:
    """Return the `LastSkip` of a state before any skipped step."""
    leaves = len(jax.tree.leaves((params, model_state)))
    return LastSkip(jnp.zeros((), jnp.int32), jnp.zeros(leaves, jnp.bool_))


def _as_stored(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Widen an array to `dtype`; XLA may else read it before it was rounded."""
    return x if x.dtype == dtype else jax.lax.optimization_barrier(x).astype(dtype)


def _became_nonfinite(new: PyTree, old: PyTree) -> jax.Array:
    """Return which leaves of a model state were finite and now are not; shape=(leaves,), bool.

    A state may contain infinities from the start: a smallest loss so far, or the mask of a cache.
    """
    return nonfinite_leaves(new) & ~nonfinite_leaves(old)


def _loss_of_parameters(
    grads: Callable[[TrainState, PyTree], GradResult], state: TrainState, batch: PyTree
) -> Callable[[PyTree], jax.Array]:
    """Return the loss of one step as a function of the parameters, traced only if called.

    Its derivative is the step's gradients, computed under the loss scale and unscaled.
    """

    @jax.custom_vjp
    def loss(params: PyTree) -> jax.Array:
        return grads(state._replace(params=params), batch).loss

    def forward(params: PyTree) -> tuple[jax.Array, PyTree]:
        result = grads(state._replace(params=params), batch)
        return result.loss, jax.tree.map(lambda g, p: g.astype(p.dtype), result.grads, params)

    def backward(gradients: PyTree, cotangent: jax.Array) -> tuple[PyTree]:
        return (jax.tree.map(lambda g: g * cotangent.astype(g.real.dtype), gradients),)

    loss.defvjp(forward, backward)
    return loss


def _own(x: Any) -> jax.Array:
    """Return a copy that may be donated, strongly typed.

    The first step would drop a weak type, and the second step would be compiled again.
    """
    x = jnp.asarray(x)
    return jnp.array(x, dtype=x.dtype, copy=True)


def _loss_and_rest(loss_fn: Function) -> Function:
    """Wrap a loss function so that it always returns `loss, (aux, model_state)`."""

    def normalised(params: PyTree, batch: PyTree, **extras: Any) -> PyTree:
        out = loss_fn(params, batch, **extras)
        out = out if isinstance(out, tuple) else (out,)
        expected = "(loss, aux, model_state)" if "model_state" in extras else "loss or (loss, aux)"
        if len(out) > 3 or (len(out) == 3) != ("model_state" in extras):
            raise TypeError(f"the loss function returned {len(out)} values; expected {expected}")
        loss, aux, model_state = (*out, None, None)[:3]
        return loss, (aux, model_state)

    return normalised
