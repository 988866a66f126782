"""Calls of the step: the compiled program of several steps, and the batches that it is given."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jmp_train.config.experiment import AnyExperiment
from jmp_train.data.batches import Batches, first_batch, iterate, iterate_rows
from jmp_train.data.dataset import Arrays, DataError, Source
from jmp_train.data.order import Order
from jmp_train.data.streams import Stream
from jmp_train.runs.build import Parts
from jmp_train.runs.devices import own_rows, put_batch
from jmp_train.runs.loop import last_of_stack
from jmp_train.runs.steps_per_call import bytes_of, choose_steps_per_call
from jmp_train.step.donation import Donating
from jmp_train.step.state import StepInfo, TrainState
from jmp_train.types import Batch, PyTree

_SHARE = 0.25  # of the device's memory, for training arrays


class Calls(NamedTuple):
    """A compiled call of one or several steps, and what it is called with."""

    call: Callable[[TrainState, Any], tuple[TrainState, StepInfo]]
    iterate: Callable[[], Batches]  # from the first batch on: one item for each call
    last_batch: Callable[[Any, int], Batch]  # of the last step of a call, from its item
    steps: int  # in a call
    data_on_device: bool
    compile_time_s: float
    memory: Any  # the compiled program's `memory_analysis()`


def compile_calls(
    experiment: AnyExperiment, parts: Parts, state: TrainState, *, start: int = 0
) -> Calls:
    """Compile the call of a run.

    If the training examples are arrays that fit on the device, they are kept there, and an item is
    the row indices of its examples. Otherwise an item is the batches themselves.

    Args:
      experiment: its `steps_per_call` and `data_on_device` are used.
      parts: of the experiment.
      state: a state, for its shapes.
      start: steps already taken.
    """
    began = time.perf_counter()
    sharded = parts.sharded
    device = next(d for d in state.step.devices() if d.process_index == jax.process_index())
    arrays = _resident_arrays(experiment, parts.dataset.train, device)
    batch = first_batch(parts.batches)
    rows = np.zeros(experiment.batch_size, np.int32)
    steps = experiment.steps_per_call
    if steps is None:
        traced = parts.stepper.step.trace(state, batch)
        _, info = traced.out_info
        steps = choose_steps_per_call(
            experiment,
            start,
            step=traced.jaxpr.jaxpr,
            step_bytes=bytes_of(batch if arrays is None else rows) + bytes_of(info),
            platform=device.platform,
        )
    if arrays is None:
        iterator = lambda: iterate(parts.batches, steps)
        program = parts.stepper.step if steps == 1 else parts.stepper.scan
        item = _stacked(batch, steps)
        own = None
        if not isinstance(parts.dataset.train, Stream):
            own = own_rows(sharded, experiment.batch_size)
        put = lambda item: item if sharded is None else put_batch(item, sharded, steps, own)
        compiled = program.lower(state, put(item)).compile()
        call, last_batch = _on_batches(compiled, batch, steps, put), last_of_stack
    else:
        order = Order(len(parts.dataset.train), experiment.batch_size, seed=experiment.seed)
        iterator = lambda: iterate_rows(order, steps)
        data = jax.device_put(arrays, device) if sharded is None else sharded.replicate(arrays)
        program = _step_on_rows(parts.stepper.pure_step, steps)
        compiled = program.lower(state, (data, _stacked(rows, steps))).compile()
        call = lambda state, rows: compiled(state, (data, rows))
        last_batch = lambda rows, steps: _rows_of(arrays, last_of_stack(rows, steps))
    return Calls(
        call=call,
        iterate=iterator,
        last_batch=last_batch,
        steps=steps,
        data_on_device=arrays is not None,
        compile_time_s=time.perf_counter() - began,
        memory=compiled.memory_analysis(),
    )


def _resident_arrays(
    experiment: AnyExperiment, source: Source, device: Any
) -> dict[str, np.ndarray] | None:
    """Return the arrays to keep on the device; None if batches have to be sent."""
    if not experiment.data_on_device or type(source) is not Arrays or source.augment is not None:
        return None
    arrays = {name: np.asarray(array) for name, array in source.arrays.items()}
    limit = _SHARE * _device_memory(device)
    return arrays if bytes_of(arrays) <= limit else None


def _device_memory(device: Any) -> int:
    """Return the bytes of a device's memory; 0 if it is not known."""
    found = (device.memory_stats() or {}).get("bytes_limit")
    if found is not None:
        return found
    if device.platform != "cpu":
        return 0
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return 0


def _step_on_rows(pure_step: Callable[..., Any], steps: int) -> Donating:
    """Return the jitted steps of `(state, (arrays, rows))`, which gathers each batch on the device."""

    def step(state: TrainState, item: Any) -> tuple[TrainState, StepInfo]:
        arrays, rows = item

        def on_rows(state: TrainState, rows: jax.Array) -> tuple[TrainState, StepInfo]:
            gather = lambda x: x.at[rows].get(mode="promise_in_bounds")
            return pure_step(state, jax.tree.map(gather, arrays))

        return on_rows(state, rows) if steps == 1 else jax.lax.scan(on_rows, state, rows)

    return Donating(step)


def _on_batches(
    compiled: Callable[..., Any], first: Batch, steps: int, put: Callable[[Any], Any]
) -> Callable[[TrainState, Any], tuple[TrainState, StepInfo]]:
    """Return a compiled call whose error for a batch unlike the first one names what differs."""

    def call(state: TrainState, item: Any) -> tuple[TrainState, StepInfo]:
        try:
            return compiled(state, put(item))
        except (TypeError, ValueError) as error:
            difference = _difference(item, first, axes=int(steps > 1))
            if difference is None:
                raise
            raise DataError(f"the batch of step {int(state.step) + 1} {difference}") from error

    return call


def _difference(item: Batch, first: Batch, axes: int) -> str | None:
    """Return how an item differs from the first batch; None if it does not.

    Args:
      item: arrays by name, with so many axes before those of a batch.
      first: the first batch.
      axes: number of axes of steps.
    """
    if item.keys() != first.keys():
        return f"has {', '.join(item)}; expected {', '.join(first)}, as the first batch has"
    for name, x in item.items():
        given, wanted = (
            jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(array.dtype))
            for shape, array in ((x.shape[axes:], x), (first[name].shape, first[name]))
        )
        for what in ("shape", "dtype"):
            if getattr(given, what) != getattr(wanted, what):
                return (
                    f"has {name!r} of {what} {getattr(given, what)}; expected {getattr(wanted, what)}, "
                    "as in the first batch"
                )
    return None


def _stacked(batch: PyTree, steps: int) -> PyTree:
    """Return an item in the shape of those of a call, without a copy."""
    return (
        batch
        if steps == 1
        else jax.tree.map(lambda x: np.broadcast_to(x, (steps, *x.shape)), batch)
    )


def _rows_of(arrays: PyTree, rows: np.ndarray) -> Batch:
    return {name: array[rows] for name, array in arrays.items()}
