"""The loop around the step: it hands batches over, and looks at the device at log points only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jmp_train.precision.loss_scale import all_finite
from jmp_train.training.state import StepInfo, TrainState

_all_finite = jax.jit(all_finite)


class Diverged(Exception):
    """Training has diverged and cannot go on."""


class LoopResult(NamedTuple):
    """How the loop ended."""

    state: TrainState
    step: int  # steps taken, those before a resume included
    seconds: float  # spent in training steps, evaluation and checkpoints apart


class Every(NamedTuple):
    """How many steps lie between two events of a kind; the last step is one of each."""

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
    log: Callable[[int, dict[str, Any]], None],
    evaluate: Callable[[int, TrainState], None],
    checkpoint: Callable[[int, TrainState, float], None],
    should_stop: Callable[[], bool] = lambda: False,
    skips_nonfinite: bool = False,
    max_skipped_in_row: int = 100,
) -> LoopResult:
    """Runs the steps from `start` to `stop`.

    Nothing waits for the device between two events, so the host can run ahead of it.

    Args:
      step_fn: takes `steps_per_call` steps; the state is donated to it.
      state: at `start`.
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
      skips_nonfinite: whether `step_fn` skips steps that are not finite, so that a loss which is
        not finite can mend.
      max_skipped_in_row: so many skipped steps in a row end the run.

    Raises:
      Diverged: at an event, before it saves: if the loss is not finite and such steps are not
        skipped, if too many in a row were skipped, or if a parameter is not finite.
    """
    at = logged = start
    seconds = since_log = 0.0
    stopped = False
    began = time.perf_counter()
    while at < stop and not stopped:
        state, info = step_fn(state, next(batches))
        at += steps_per_call
        stopped = should_stop()
        last = stopped or at >= stop
        log_due, evaluate_due, checkpoint_due = (last or at % n == 0 for n in every)
        if not (log_due or evaluate_due or checkpoint_due):
            continue
        values = _train_values(info, state, steps_per_call)  # waits for the device
        elapsed = time.perf_counter() - began
        seconds, since_log = seconds + elapsed, since_log + elapsed
        if log_due:
            log(at, {**values, "steps_per_second": (at - logged) / since_log})
            logged, since_log = at, 0.0
        _check_diverged(at, values, state, skips_nonfinite, max_skipped_in_row)
        if evaluate_due and not stopped:
            evaluate(at, state)
        if checkpoint_due:
            checkpoint(at, state, seconds)
        began = time.perf_counter()
    return LoopResult(state, at, seconds)


def _train_values(info: StepInfo, state: TrainState, steps_per_call: int) -> dict[str, Any]:
    """The last step's numbers, on the host."""
    info, skipped, in_row = jax.device_get((info, state.skipped, state.skipped_in_row))
    if steps_per_call > 1:
        info = jax.tree.map(lambda x: x[-1], info)
    values = {"loss": float(info.loss)}
    if isinstance(info.aux, dict):
        values = {k: v.item() for k, v in info.aux.items() if np.ndim(v) == 0} | values
    if info.grad_norm is not None:
        values["grad_norm"] = float(info.grad_norm)
    values["loss_scale"] = 1.0 if info.loss_scale is None else float(info.loss_scale)
    return {**values, "skipped_steps": int(skipped), "skipped_in_row": int(in_row)}


def _check_diverged(
    at: int, values: dict[str, Any], state: TrainState, skips_nonfinite: bool, limit: int
) -> None:
    if values["skipped_in_row"] >= limit:
        raise Diverged(
            f"{values['skipped_in_row']} steps in a row up to step {at} had non-finite gradients "
            f"and were skipped (loss scale {values['loss_scale']:g}); try a lower learning rate "
            "or --policy mixed_bfloat16"
        )
    if not skips_nonfinite and not math.isfinite(values["loss"]):
        raise Diverged(f"the loss is {values['loss']} at step {at}; try a lower learning rate")
    if not _all_finite(state.params):
        raise Diverged(f"a parameter is not finite after step {at}; try a lower learning rate")
