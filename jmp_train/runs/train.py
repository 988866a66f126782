"""Train an experiment in a run directory, resuming from its newest checkpoint."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from rich.console import Console

from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.warmup import fit_warmup
from jmp_train.errors import UsageError
from jmp_train.records.trackers import Trackers, make_trackers
from jmp_train.reports.progress import RunProgress, print_line
from jmp_train.reports.stages import stage
from jmp_train.runs.build import build, check_batch_size, matmul_precision
from jmp_train.runs.calls import Calls, compile_calls
from jmp_train.runs.check_evaluation import check_evaluation
from jmp_train.runs.context import RunContext
from jmp_train.runs.devices import check_batch_splits
from jmp_train.runs.directory import (
    check_directory,
    check_same_data,
    config_json,
    not_writable,
    open_checkpoints,
    read_config,
    run_id,
    write_config,
    write_files,
    write_spec,
)
from jmp_train.runs.events import Events
from jmp_train.runs.find import RUNS
from jmp_train.runs.folders import results_folder
from jmp_train.runs.header import show_header
from jmp_train.runs.lock import lock_directory
from jmp_train.runs.loop import Every, LoopResult, run_loop
from jmp_train.runs.processes import StopTogether, is_first, several, wait_for_all
from jmp_train.runs.resume import Start, find_start, finished_summary
from jmp_train.runs.rollback import with_rollbacks
from jmp_train.runs.signals import Stopped, collect_signals
from jmp_train.runs.summary import summarize, write_summary
from jmp_train.runs.user_code import one_line_errors
from jmp_train.runs.window import Window
from jmp_train.types import Json


def train(
    experiment: AnyExperiment,
    run_dir: str | Path | None = None,
    *,
    name: str | None = None,
    console: Console | None = None,
    force: bool = False,
) -> Json:
    """Train an experiment in a run directory, resuming from its newest checkpoint.

    Ctrl-C ends the current step, saves the state and raises `Stopped`, in a notebook too; the same call
    resumes the run. It has its usual effect if this is called in a thread other than the main one.

    Args:
      experiment: what to train.
      run_dir: a directory with a run of the same experiment, which is resumed; or an empty or a new
        directory. None makes runs/NAME/TIME.
      name: the name of the experiment; None: that of the run in the directory, or the name of a new
        directory. `load_run` and the command line find the experiment by it.
      console: where to show progress, such as `rich.console.Console()`; None shows nothing.
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
    if console is None or not is_first():  # one process speaks for all
        console = Console(quiet=True)
    given = None if run_dir is None else Path(run_dir)
    name = name or _name_of(given)
    with results_folder(given, RUNS / name) as folder:
        return _train_in(folder, name, experiment, console, force, began)


def _name_of(run_dir: Path | None) -> str:
    """Return the name of the experiment of a run, or a name for that of a new one."""
    if run_dir is None:
        return "experiment"
    if os.path.exists(run_dir / "config.json"):  # false for a path that no file can have
        return read_config(run_dir)[0]
    return run_dir.resolve().name


def _train_in(
    run_dir: Path,
    name: str,
    experiment: AnyExperiment,
    console: Console,
    force: bool,
    began: float,
) -> Json:
    asked_warmup = experiment.optimizer.warmup_steps
    experiment, scaled = fit_warmup(experiment)
    with (
        collect_signals(notice=not console.quiet, shared=several()) as stopped,
        matmul_precision(experiment.matmul_precision),
    ):
        # Refuses before anything is written.
        check_directory(run_dir, name, experiment, asked_warmup, force)
        trackers = Trackers(silent=True)
        if is_first():
            trackers = Trackers(make_trackers(experiment.trackers, experiment.own_trackers))
        with stage(console, "loading data"):
            parts = build(experiment, run_dir)
        if stopped and not several():  # before anything is written
            raise Stopped(stopped[0], 0, run_dir)
        check_batch_splits(experiment, parts.sharded)
        check_evaluation(experiment, parts)
        if not (run_dir / "config.json").exists():  # an older run is resumed as it began
            check_batch_size(experiment, parts.dataset)
        wait_for_all("checked")
        with lock_directory(run_dir, console) if is_first() else contextlib.nullcontext():
            for line in filter(None, (scaled, *parts.dataset.notes)):
                print_line(console, line)
            # The run may have begun since.
            changed = check_directory(run_dir, name, experiment, asked_warmup, force)
            changed += check_same_data(run_dir, parts.dataset, force)
            if changed:
                print_line(console, f"changed: {', '.join(changed)}")
            # A kill leaves a directory that is a run's.
            if is_first() and not (run_dir / "config.json").exists():
                write_config(run_dir, name, experiment)
                write_spec(run_dir, parts.dataset)
                write_files(run_dir, parts.dataset.files)
            wait_for_all("configured")
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
                    ),
                    trackers,
                )


def _resume(context: RunContext, trackers: Trackers) -> Json:
    """Train from the newest checkpoint, or return the summary of a finished run."""
    experiment, run_dir = context.experiment, context.run_dir
    with one_line_errors():
        start = find_start(context)
    if start.step > experiment.steps:
        raise UsageError(f"{run_dir} is at step {start.step}; expected --steps of at least that")
    if start.step % (experiment.steps_per_call or 1):
        raise UsageError(
            f"{run_dir} is at step {start.step}; expected --steps-per-call that divides it"
        )
    if start.step:
        print_line(context.console, f"{run_dir} is at step {start.step}")
    finished = finished_summary(run_dir, start, experiment.steps)
    if finished is not None:
        return finished
    wait_for_all("restored")
    if is_first():
        write_config(run_dir, context.name, experiment)
        write_spec(run_dir, context.parts.dataset)
        write_files(run_dir, context.parts.dataset.files)
    context.checkpoints.set_aside_after(start.step)
    show_header(context, start.state.params)
    with stage(context.console, "compiling"), one_line_errors():
        calls = compile_calls(experiment, context.parts, start.state, start=start.step)

    if context.stopped and not several():  # nothing has been trained that must be saved
        raise Stopped(context.stopped[0], start.step, run_dir)

    def attempt(start: Start) -> Json:
        nonlocal calls
        if start.step % calls.steps:  # rolled back to where an earlier process was stopped
            calls = compile_calls(experiment, context.parts, start.state, start=start.step)
        return _train_once(context, trackers, start, calls)

    return with_rollbacks(attempt, context, start)


def _train_once(context: RunContext, trackers: Trackers, start: Start, calls: Calls) -> Json:
    """Train to the last step, or to where a hook ends the run, and write the summary."""
    _start_trackers(context, trackers, start)
    summary: Json = {}
    try:
        result, events = _run_steps(context, trackers, start, calls)
        context.checkpoints.wait()
        if events.error is not None:
            raise events.error
        evaluation = events.metrics_of_the_end(result.step, result.state)
        if result.step == start.step:  # only the summary was missing
            evaluation = context.parts.evaluate(result.state)
        summary = summarize(
            context,
            result,
            evaluation,
            calls=calls,
            train_time_s=start.train_time_s + result.seconds,
            wall_time_s=start.wall_time_s + time.perf_counter() - context.began,
            rollbacks=start.rollbacks,
            skipped_examples=events.skipped_examples,
            ended=events.ended,
        )
        finished = result.step >= context.experiment.steps or events.ended is not None
        if is_first():
            write_summary(context, summary, finished=finished)
        wait_for_all("finished")
    finally:
        trackers.finish(summary)
    if events.ended is not None:
        line = f"stopped at step {result.step}: {events.ended['reason']}"
        print_line(context.console, line)
    if not finished:
        raise Stopped(context.stopped[0], result.step, context.run_dir)
    return summary


def _run_steps(
    context: RunContext, trackers: Trackers, start: Start, calls: Calls
) -> tuple[LoopResult, Events]:
    """Run the steps with their records, evaluations and checkpoints.

    Returns:
      How the loop ended, and its events.
    """
    experiment = context.experiment
    batches = calls.iterate()
    if start.data is not None:
        batches.set_state(start.data)
    batches.skip(start.batches_left_out)
    window = Window(start.window)
    progress = RunProgress(
        context.console, start=start.step, total=experiment.steps, name=context.name
    )
    events = Events(context, start, trackers, progress, batches, window)
    if not batches.can_seek:
        line = "the data cannot be read from a position: a resumed run reads them again up to it"
        print_line(context.console, line)
        if batches.replayed:
            print_line(context.console, f"read {batches.replayed} batches again")
    for file in ("diverged.json", "diverged.txt"):  # of an earlier attempt, which is resumed
        if is_first():
            (context.run_dir / file).unlink(missing_ok=True)
    with contextlib.closing(progress), contextlib.closing(batches):
        result = run_loop(
            calls.call,
            start.state,
            batches,
            start=start.step,
            stop=start.step if start.ended else experiment.steps,
            steps_per_call=calls.steps,
            every=Every(experiment.log_every, experiment.eval_every, experiment.checkpoint_every),
            log=events.log,
            evaluate=events.evaluate,
            checkpoint=events.checkpoint,
            should_stop=StopTogether(context.stopped),
            skips_nonfinite=start.state.last_skip is not None,
            max_skipped_in_row=experiment.max_skipped_in_row,
            last_batch=calls.last_batch,
            window=window,
        )
    return result, events


def _start_trackers(context: RunContext, trackers: Trackers, start: Start) -> None:
    if not is_first():
        return
    run = {
        "id": run_id(context.run_dir),
        "directory": str(context.run_dir.resolve()),
        "step": start.step,
    }
    try:
        trackers.start({**config_json(context.name, context.experiment), "run": run})
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise not_writable(context.run_dir, error) from None
