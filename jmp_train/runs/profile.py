"""A trace of some training steps, for Perfetto."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.warmup import fit_warmup
from jmp_train.runs.build import (
    build,
    check_batch_size,
    first_state,
    matmul_precision,
)
from jmp_train.runs.calls import compile_calls
from jmp_train.runs.devices import check_batch_splits
from jmp_train.runs.directory import check_path, not_writable
from jmp_train.runs.loop import Every, run_loop
from jmp_train.step.state import StepInfo, TrainState
from jmp_train.types import PyTree

_WARM_UP = 3  # calls before the trace: the first ones allocate memory and choose algorithms


def profile_experiment(experiment: AnyExperiment, run_dir: Path, *, steps: int) -> Path:
    """Trace training steps from the beginning of an experiment, in the loop of `train`.

    Nothing is saved but the trace. A run in the directory is neither read nor changed.

    Args:
      experiment: what to train.
      run_dir: the trace is written to its subfolder `profile`.
      steps: number of steps to trace; rounded up to a multiple of `steps_per_call`,
        which is 1 unless the experiment sets it.

    Returns:
      The path of the trace, gzip-compressed JSON in Chrome's trace format. Each call of the step is
      an event named "train".

    Raises:
      UsageError: if the data cannot be read, or the directory cannot be written.
      Diverged: if a step is not finite, and such steps are not skipped.
    """
    check_path(run_dir)
    experiment, _ = fit_warmup(experiment)
    with matmul_precision(experiment.matmul_precision):
        parts = build(experiment)
        check_batch_splits(experiment, parts.sharded)
        check_batch_size(experiment, parts.dataset)
        state = first_state(experiment, parts)
        # One step a call by default, so that the trace shows each of them.
        per_call = experiment.steps_per_call or 1
        calls = compile_calls(
            dataclasses.replace(experiment, steps_per_call=per_call), parts, state
        )
        numbers = itertools.count()

        def annotated(state: TrainState, batch: PyTree) -> tuple[TrainState, StepInfo]:
            with jax.profiler.StepTraceAnnotation("train", step_num=next(numbers)):
                return calls.call(state, batch)

        def take_steps(
            state: TrainState, batches: Iterator[Any], start: int, stop: int
        ) -> TrainState:
            return run_loop(
                annotated,
                state,
                batches,
                start=start,
                stop=stop,
                steps_per_call=per_call,
                every=Every(stop, stop, stop),
                log=lambda step, values, state: None,
                evaluate=lambda step, state: None,
                checkpoint=lambda step, state, seconds: None,
                skips_nonfinite=state.last_skip is not None,
                max_skipped_in_row=experiment.max_skipped_in_row,
            ).state

        batches = calls.iterate()
        begin = _WARM_UP * per_call
        end = begin + -(-steps // per_call) * per_call
        state = take_steps(state, batches, 0, begin)
        folder = _make_folder(run_dir)
        before = set(folder.rglob("*"))
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow the host, and widen the gaps between steps
        with jax.profiler.trace(str(folder), create_perfetto_trace=True, profiler_options=options):
            take_steps(state, batches, begin, end)
        (trace,) = (path for path in set(folder.rglob("perfetto_trace.json.gz")) - before)
        return trace


def _make_folder(run_dir: Path) -> Path:
    folder = run_dir / "profile"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(run_dir, error) from None
    return folder
