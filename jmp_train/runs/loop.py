"""The loop around the step: it waits for the device at events only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jmp_train.errors import UsageError
from jmp_train.loss_scales.states import DynamicLossScale
from jmp_train.step.state import StepInfo, TrainState
from jmp_train.tree import all_finite, path_names
from jmp_train.types import Json, PyTree

_all_finite = jax.jit(all_finite)

#: Number of consecutive skipped steps at the minimum scale that ends the run. A scale falls from
#: 65,536 to 1 in 16 steps. This is DeepSpeed's rule (an overflow at the minimum is an error), but a
#: run that stays at the minimum survives a few bad batches.
SKIPS_AT_MINIMUM = 10

#: Largest number of tensor names in a train record.
_NAMES = 8


class LastCall(NamedTuple):
    """State of the loop when training diverged."""

    step: int  # steps taken
    state: TrainState
    batch: PyTree  # of the last step alone
    loss_scale: float  # of the last step
    skipped: bool  # whether the last step was skipped, and so can be replayed
    bad: int  # the first step known to have gone wrong; of skipped ones, the last


class Diverged(Exception):
    """Training has diverged and cannot continue; `last` is the last call of the step."""

    def __init__(self, message: str, last: LastCall | None = None):
        super().__init__(message)
        self.last = last


class LoopResult(NamedTuple):
    """How the loop ended."""

    state: TrainState
    step: int  # steps taken, those before a resume included
    seconds: float  # spent in training steps, without evaluation and checkpoints


class Every(NamedTuple):
    """Steps between two events of a kind; the last step has an event of each kind."""

    log: int
    evaluate: int
    checkpoint: int


def run_loop(
    step_fn: Callable[[TrainState, Any], tuple[TrainState, StepInfo]],
    state: TrainState,
    batches: Iterator[Any],
    *,
    start: int,
    stop: int,
    steps_per_call: int,
    every: Every,
    log: Callable[[int, Json], None],
    evaluate: Callable[[int, TrainState], None],
    checkpoint: Callable[[int, TrainState, float], None],
    should_stop: Callable[[], bool] = lambda: False,
    skips_nonfinite: bool = False,
    max_skipped_in_row: int = 100,
) -> LoopResult:
    """Run the steps from `start` to `stop`.

    Nothing waits for the device between two events, so the host can run ahead of it.

    Args:
      step_fn: takes `steps_per_call` steps; the state is donated to it.
      state: the state at `start`.
      batches: one item for each call of `step_fn`.
      start: steps already taken.
      stop: steps at the end.
      steps_per_call: divides `start`, `stop` and all of `every`.
      every: when to log, evaluate and save.
      log: gets the step and the values of the train record.
      evaluate: gets the step and the state.
      checkpoint: gets the step, the state and the seconds spent in steps so far; it must have
        copied what it needs on return.
      should_stop: asked between calls; true ends the loop after a checkpoint.
      skips_nonfinite: whether `step_fn` skips steps that are not finite, so that a loss
        that is not finite can recover.
      max_skipped_in_row: number of skipped steps in a row that ends the run.

    Raises:
      UsageError: if a batch cannot be read; the state before it is saved.
      Diverged: at an event, before it saves: if the loss is not finite and such steps are not
        skipped, if too many in a row were skipped, if `SKIPS_AT_MINIMUM` were and the last of them
        at the dynamic loss scale's minimum, or if a parameter is not finite.
    """
    at = logged = start
    seconds = since_log = 0.0
    stopped = False
    losses: list[Any] = []  # of the calls since the last event, still on the device
    began = time.perf_counter()
    while at < stop and not stopped:
        try:
            batch = next(batches)
        except UsageError:  # data that cannot be read: keep the steps until here
            if at > start and _all_finite(state.params):
                checkpoint(at, state, seconds + time.perf_counter() - began)
            raise
        state, info = step_fn(state, batch)
        at += steps_per_call
        if not skips_nonfinite:
            losses.append((info.loss, info.grad_norm))
        stopped = should_stop()
        last = stopped or at >= stop
        log_due, evaluate_due, checkpoint_due = (last or at % n == 0 for n in every)
        if not (log_due or evaluate_due or checkpoint_due):
            continue
        values = _train_values(info, state, steps_per_call, logged)  # waits for the device
        elapsed = time.perf_counter() - began
        seconds, since_log = seconds + elapsed, since_log + elapsed
        if log_due:
            log(at, {**values, "steps_per_second": (at - logged) / since_log})
            logged, since_log = at, 0.0
        reason = _diverged(at, values, state, skips_nonfinite, max_skipped_in_row)
        if reason:
            if steps_per_call > 1:
                batch = jax.tree.map(lambda x: x[-1], batch)
            skipped = values["skipped_in_row"] > 0
            bad = _first_bad(at, losses)
            if bad < at:
                reason = f"{reason}; it began with step {bad}"
            raise Diverged(reason, LastCall(at, state, batch, values["loss_scale"], skipped, bad))
        losses.clear()
        if evaluate_due and not stopped:
            evaluate(at, state)
        if checkpoint_due:
            checkpoint(at, state, seconds)
        began = time.perf_counter()
    return LoopResult(state, at, seconds)


def _train_values(info: StepInfo, state: TrainState, steps_per_call: int, logged: int) -> Json:
    """Return the last step's values on the host, and the last skip's if it came after `logged`."""
    info, skipped, in_row, last_skip = jax.device_get(
        (info, state.skipped, state.skipped_in_row, state.last_skip)
    )
    if steps_per_call > 1:
        info = jax.tree.map(lambda x: x[-1], info)
    values: Json = {"loss": float(info.loss)}
    if isinstance(info.aux, dict):
        values = {k: v.item() for k, v in info.aux.items() if np.ndim(v) == 0} | values
    if info.grad_norm is not None:
        values["grad_norm"] = float(info.grad_norm)
    values["loss_scale"] = 1.0 if info.loss_scale is None else float(info.loss_scale)
    values |= {"skipped_steps": int(skipped), "skipped_in_row": int(in_row)}
    if last_skip is not None and last_skip.step > logged:
        values["last_skipped_step"] = int(last_skip.step)
        values["nonfinite"] = nonfinite_gradients(state)[:_NAMES]
        values["nonfinite_tensors"] = int(last_skip.nonfinite.sum())
    return values


def nonfinite_gradients(state: TrainState) -> list[str]:
    """Return the paths that were not finite in the last skipped step: parameters, for their gradients,
    and leaves of the model state, under `model_state/`."""
    if state.last_skip is None:
        return []
    names = path_names(state.params)
    names += [f"model_state/{name}" for name in path_names(state.model_state)]
    flags = np.asarray(state.last_skip.nonfinite)
    return [name for name, bad in zip(names, flags, strict=True) if bad]


def _diverged(at: int, values: Json, state: TrainState, skips_nonfinite: bool, limit: int) -> str:
    """Return why the run cannot continue; '' where it can."""
    in_row, scale = values["skipped_in_row"], values["loss_scale"]
    lowest = state.loss_scale.lowest if isinstance(state.loss_scale, DynamicLossScale) else 0.0
    at_minimum = scale <= lowest and in_row >= min(limit, SKIPS_AT_MINIMUM)
    if in_row >= limit or at_minimum:
        why = f", the lowest that it may be ({lowest:g})" if at_minimum else ""
        return (
            f"{in_row} steps in a row up to step {at} were not finite and were skipped "
            f"(loss scale {scale:g}{why})"
        )
    if not skips_nonfinite and not math.isfinite(values["loss"]):
        return f"the loss is {values['loss']} at step {at}"
    if not _all_finite(state.params):
        return f"a parameter is not finite after step {at}"
    return ""


def _first_bad(at: int, losses: list[Any]) -> int:
    """Return the first step up to `at` whose loss or gradient norm is not finite; else `at`.

    Args:
      at: the last step.
      losses: (loss, norm or None) of the calls up to it; shapes () or (steps in a call,).
    """
    good = [
        np.all([np.isfinite(x) for x in call if x is not None], axis=0).ravel()
        for call in jax.device_get(losses)
    ]
    bad = np.flatnonzero(~np.concatenate(good)) if good else []
    return at - sum(map(len, good)) + 1 + int(bad[0]) if len(bad) else at
