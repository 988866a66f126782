"""Train an experiment in a run directory, resuming from its newest checkpoint."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import jax
from rich.console import Console

from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.warmup import fit_warmup
from jmp_train.data.batches import iterate
from jmp_train.errors import UsageError
from jmp_train.records.metrics import MetricsWriter
from jmp_train.records.provenance import package_versions, unused_devices_line
from jmp_train.reports.progress import RunProgress, print_line
from jmp_train.reports.stages import stage
from jmp_train.runs.build import build, check_batch_size, compile_step, matmul_precision
from jmp_train.runs.context import RunContext
from jmp_train.runs.directory import (
    check_directory,
    config_json,
    not_writable,
    open_checkpoints,
    write_config,
)
from jmp_train.runs.header import show_header
from jmp_train.runs.lock import lock_directory
from jmp_train.runs.loop import Every, LoopResult, run_loop
from jmp_train.runs.resume import Start, find_start, finished_summary
from jmp_train.runs.rollback import with_rollbacks
from jmp_train.runs.signals import Stopped, collect_signals
from jmp_train.runs.summary import summarize, write_summary
from jmp_train.step.state import TrainState
from jmp_train.types import Json


def train(
    name: str,
    experiment: AnyExperiment,
    run_dir: Path,
    console: Console | None = None,
    *,
    force: bool = False,
) -> Json:
    """Train an experiment in a run directory, resuming from its newest checkpoint.

    Args:
      name: the name of the experiment.
      experiment: what to train.
      run_dir: a directory with a run of the same experiment, which is resumed; or an empty or a new
        directory.
      console: where to show progress; None shows nothing.
      force: resume a run or a checkpoint of other settings, as far as its state fits.

    Returns:
      The content of summary.json.

    Raises:
      UsageError: if the directory cannot be written, is in use by another process, or holds a run of
        another experiment, a run with other settings, or files that belong to no run.
      NoUsableCheckpoint: if it holds checkpoints and none can be loaded.
      NotSaved: if the last checkpoint, or the summary, cannot be written.
      Diverged: if training diverges; its message is the report, which diverged.txt and diverged.json
        in the run directory hold too. Nothing is saved after the newest checkpoint.
      Stopped: if SIGTERM, SIGINT or SIGUSR1 ended the run, after saving.
    """
    began = time.perf_counter()
    console = Console(quiet=True) if console is None else console
    asked_warmup = experiment.optimizer.warmup_steps
    experiment, scaled = fit_warmup(experiment)
    with collect_signals() as stopped, matmul_precision(experiment.matmul_precision):
        # Refuses before anything is written.
        check_directory(run_dir, name, experiment, asked_warmup, force)
        with stage(console, "loading data"):
            parts = build(experiment)
        if not (run_dir / "config.json").exists():  # an older run is resumed as it began
            check_batch_size(experiment, parts.dataset)
        with lock_directory(run_dir, console):
            for line in filter(None, (unused_devices_line(), scaled)):
                print_line(console, line)
            # The run may have begun since.
            changed = check_directory(run_dir, name, experiment, asked_warmup, force)
            if changed:
                print_line(console, f"changed: {', '.join(changed)}")
            if not (run_dir / "config.json").exists():  # a kill leaves a directory that is a run's
                write_config(run_dir, name, experiment)
            with contextlib.closing(
                open_checkpoints(run_dir, experiment, clean=True)
            ) as checkpoints:
                return _resume(
                    RunContext(
                        name=name,
                        experiment=experiment,
                        run_dir=run_dir,
                        console=console,
                        force=force,
                        parts=parts,
                        checkpoints=checkpoints,
                        stopped=stopped,
                        began=began,
                        asked_warmup=asked_warmup,
                    )
                )


def _resume(context: RunContext) -> Json:
    """Train from the newest checkpoint, or return the summary of a finished run."""
    experiment, run_dir = context.experiment, context.run_dir
    start = find_start(context)
    if start.step > experiment.steps:
        raise UsageError(f"{run_dir} is at step {start.step}; expected --steps of at least that")
    if start.step:
        print_line(context.console, f"{run_dir} is at step {start.step}")
    finished = finished_summary(run_dir, start.step, experiment.steps)
    if finished is not None:
        return finished
    write_config(run_dir, context.name, experiment)
    context.checkpoints.set_aside_after(start.step)
    show_header(context, start.state.params)
    with stage(context.console, "compiling"):
        compiled, compile_time = compile_step(experiment, context.parts, start.state)

    def attempt(start: Start) -> Json:
        return _train_once(context, start, compiled, compile_time)

    return with_rollbacks(attempt, context, start)


def _train_once(
    context: RunContext, start: Start, compiled: jax.stages.Compiled, compile_time: float
) -> Json:
    """Train to the last step, and write the summary."""
    experiment, checkpoints = context.experiment, context.checkpoints
    result, evaluation = _run_steps(context, start, compiled)
    checkpoints.wait()
    if result.step == start.step:  # only the summary was missing
        evaluation = context.parts.evaluate(result.state)
    summary = summarize(
        context,
        result,
        evaluation,
        compile_time_s=compile_time,
        train_time_s=start.train_time_s + result.seconds,
        wall_time_s=start.wall_time_s + time.perf_counter() - context.began,
        rollbacks=start.rollbacks,
        memory=compiled.memory_analysis(),
    )
    unfinished = bool(context.stopped) and result.step < experiment.steps
    write_summary(context, summary, finished=not unfinished)
    if unfinished:
        raise Stopped(context.stopped[0], result.step, context.run_dir)
    return summary


def _run_steps(
    context: RunContext, start: Start, compiled: jax.stages.Compiled
) -> tuple[LoopResult, dict[str, float]]:
    """Run the steps with their records, evaluations and checkpoints.

    Returns:
      How the loop ended, and the metrics of the last step; {} where that step was not evaluated.
    """
    name, experiment, run_dir = context.name, context.experiment, context.run_dir
    batches = iterate(context.parts.batches)
    if start.data is not None:
        batches.set_state(start.data)
    for _ in range(start.calls_left_out):
        next(batches)
    writer = _open_metrics(run_dir, start.step)
    progress = RunProgress(context.console, start=start.step, total=experiment.steps, name=name)
    evaluated: tuple[int, dict[str, float]] = (-1, {})

    def log(step: int, values: Json) -> None:
        writer.write(step, "train", values)
        progress.train(step, values)

    def evaluate(step: int, state: TrainState) -> None:
        nonlocal evaluated
        evaluated = (step, context.parts.evaluate(state))
        writer.write(step, "eval", evaluated[1])
        progress.evaluation(step, evaluated[1])

    def checkpoint(step: int, state: TrainState, seconds: float) -> None:
        try:
            writer.flush()  # no checkpoint before the records up to it: a resume leaves no gap
        except OSError as error:
            context.checkpoints.give_up(step, error)
            return
        extra = {
            "config": config_json(name, experiment),
            "versions": package_versions(),
            "data": batches.get_state(),
            "wall_time_s": start.wall_time_s + time.perf_counter() - context.began,
            "train_time_s": start.train_time_s + seconds,
            "rollbacks": start.rollbacks,
        }
        context.checkpoints.save(
            step,
            state,
            extra=extra,
            metrics=evaluated[1] if evaluated[0] == step else None,
            wait=experiment.checkpoint_wait,
        )

    for file in ("diverged.json", "diverged.txt"):  # of an earlier attempt, which is resumed
        (run_dir / file).unlink(missing_ok=True)
    with contextlib.closing(writer), contextlib.closing(progress):
        result = run_loop(
            compiled,
            start.state,
            batches,
            start=start.step,
            stop=experiment.steps,
            steps_per_call=experiment.steps_per_call,
            every=Every(experiment.log_every, experiment.eval_every, experiment.checkpoint_every),
            log=log,
            evaluate=evaluate,
            checkpoint=checkpoint,
            should_stop=lambda: bool(context.stopped),
            skips_nonfinite=start.state.last_skip is not None,
            max_skipped_in_row=experiment.max_skipped_in_row,
        )
    return result, evaluated[1] if evaluated[0] == result.step else {}


def _open_metrics(run_dir: Path, step: int) -> MetricsWriter:
    try:
        return MetricsWriter(run_dir, resume_step=step)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise not_writable(run_dir, error) from None
