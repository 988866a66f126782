"""The loop around the step: it waits for the device at events only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jmp_train.errors import UsageError
from jmp_train.loss_scales.states import DynamicLossScale
from jmp_train.runs.processes import several
from jmp_train.runs.window import Window
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


Asked = Literal["save", "stop"] | None
"""What an event asks for beside its interval: a checkpoint now, and also the end of the run."""


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


def last_of_stack(item: PyTree, steps: int) -> PyTree:
    """Return the entries of the last step of a call; they are stacked if it has several steps."""
    return item if steps == 1 else jax.tree.map(lambda x: x[-1], item)


def run_loop(
    step_fn: Callable[[TrainState, Any], tuple[TrainState, StepInfo]],
    state: TrainState,
    batches: Iterator[Any],
    *,
    start: int,
    stop: int,
    steps_per_call: int,
    every: Every,
    log: Callable[[int, Json, TrainState], Asked],
    evaluate: Callable[[int, TrainState], Asked],
    checkpoint: Callable[[int, TrainState, float], None],
    should_stop: Callable[[], bool] = lambda: False,
    skips_nonfinite: bool = False,
    max_skipped_in_row: int = 100,
    last_batch: Callable[[Any, int], PyTree] = last_of_stack,
    window: Window | None = None,
) -> LoopResult:
    """Run the steps from `start` to `stop`.

    Nothing waits for the device between two events, so the host can run ahead of it.

    Args:
      step_fn: takes `steps_per_call` steps; the state is donated to it, unless it raises UsageError.
      state: the state at `start`.
      batches: one item for each call of `step_fn`.
      start: steps already taken.
      stop: steps at the end.
      steps_per_call: divides `start`, `stop` and all of `every`.
      every: when to log, evaluate and save.
      log: gets the step, the values of the train record and the state.
      evaluate: gets the step and the state.
      checkpoint: gets the step, the state and the seconds spent in steps so far; it must have
        copied what it needs on return.
      should_stop: asked between calls; true ends the loop after a checkpoint.
      skips_nonfinite: whether `step_fn` skips steps that are not finite, so that a loss
        that is not finite can recover.
      max_skipped_in_row: number of skipped steps in a row that ends the run.
      last_batch: returns the batch of the last step of a call, from its item and `steps_per_call`.
      window: the metrics of the steps since the last interval of `every.log`, which a resumed run
        has from its checkpoint. It is up to date when `checkpoint` is called.

    Raises:
      UsageError: if a batch cannot be read, or `step_fn` refuses it; the state before it is saved, in a
        run of one process.
      Diverged: at an event, before it saves: if the loss is not finite and such steps are not
        skipped, if too many in a row were skipped, if `SKIPS_AT_MINIMUM` were and the last of them
        at the dynamic loss scale's minimum, or if a parameter is not finite.
    """
    at = logged = start
    seconds = since_log = 0.0
    stopped = False
    window = window or Window()
    calls: list[tuple[Json, Any]] = []  # metrics since the last event, still on the device
    began = time.perf_counter()
    while at < stop and not stopped:
        try:
            batch = next(batches)
            state, info = step_fn(state, batch)
        except UsageError:  # data that cannot be read, or that changed: keep the steps until here
            # Several processes save together, and only this one knows.
            if at > start and not several() and _all_finite(state.params):
                checkpoint(at, state, seconds + time.perf_counter() - began)
            raise
        at += steps_per_call
        calls.append((_metrics(info, steps_per_call), info.finite))
        stopped = should_stop()
        last = stopped or at >= stop
        log_due, evaluate_due, checkpoint_due = (last or at % n == 0 for n in every)
        if not (log_due or evaluate_due or checkpoint_due):
            continue
        calls = jax.device_get(calls)  # waits for the device
        _add_calls(window, calls)
        values = _train_values(info, state, steps_per_call, logged)
        elapsed = time.perf_counter() - began
        seconds, since_log = seconds + elapsed, since_log + elapsed
        asked = set()
        if log_due:
            means = {**window.means(), "averaged_steps": window.taken}
            speed = {"steps_per_second": (at - logged) / since_log}
            asked.add(log(at, {**means, **values, **speed}, state))
            logged, since_log = at, 0.0
            if at % every.log == 0:  # not at the end, so that a resumed run has the same means
                window.clear()
        reason = _diverged(at, values, state, skips_nonfinite, max_skipped_in_row)
        if reason:
            batch = last_batch(batch, steps_per_call)
            skipped = values["skipped_in_row"] > 0
            bad = at if skips_nonfinite else _first_bad(at, [metrics for metrics, _ in calls])
            if bad < at:
                reason = f"{reason}; it began with step {bad}"
            raise Diverged(reason, LastCall(at, state, batch, values["loss_scale"], skipped, bad))
        calls = []
        # A stop skips its evaluation, but not one that the interval demands, which a resumed run would
        # lack, nor that of the last step, without which a run is not finished.
        if evaluate_due and (not stopped or at >= stop or at % every.evaluate == 0):
            asked.add(evaluate(at, state))
        stopped = stopped or "stop" in asked
        if checkpoint_due or asked & {"save", "stop"}:
            checkpoint(at, state, seconds)
        began = time.perf_counter()
    return LoopResult(state, at, seconds)


def _metrics(info: StepInfo, steps_per_call: int) -> Json:
    """Return the arrays of a call with one number per step, by the names of the record."""
    aux = info.aux if isinstance(info.aux, dict) else {}
    axes = int(steps_per_call > 1)
    metrics = {name: x for name, x in aux.items() if np.ndim(x) == axes}
    metrics["loss"] = info.loss
    if info.grad_norm is not None:
        metrics["grad_norm"] = info.grad_norm
    return metrics


def _add_calls(window: Window, calls: list[tuple[Json, Any]]) -> None:
    """Add the metrics of the calls, on the host, to a window."""
    join = lambda arrays: np.concatenate([np.ravel(x) for x in arrays])
    metrics = {name: join([m[name] for m, _ in calls]) for name in calls[0][0]}
    taken = None if calls[0][1] is None else join([finite for _, finite in calls])
    window.add(metrics, taken)


def _train_values(info: StepInfo, state: TrainState, steps_per_call: int, logged: int) -> Json:
    """Return the last step's values on the host, and the last skip's if it came after `logged`."""
    info, skipped, in_row, last_skip = jax.device_get(
        (info, state.skipped, state.skipped_in_row, state.last_skip)
    )
    info = last_of_stack(info, steps_per_call)
    values: Json = {f"last_{name}": x.item() for name, x in _metrics(info, 1).items()}
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
    if not skips_nonfinite and not math.isfinite(values["last_loss"]):
        return f"the loss is {values['last_loss']} at step {at}"
    if not _all_finite(state.params):
        return f"a parameter is not finite after step {at}"
    return ""


def _first_bad(at: int, calls: list[Json]) -> int:
    """Return the first step up to `at` whose loss or gradient norm is not finite; else `at`.

    Args:
      at: the last step.
      calls: metrics of the calls up to it; shapes () or (steps in a call,).
    """
    good = [
        np.all([np.isfinite(call[k]) for k in ("loss", "grad_norm") if k in call], axis=0).ravel()
        for call in calls
    ]
    bad = np.flatnonzero(~np.concatenate(good)) if good else []
    return at - sum(map(len, good)) + 1 + int(bad[0]) if len(bad) else at
