"""The state that a run starts from: its newest checkpoint, or the first state."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.settings import flatten
from jmp_train.data.batches import saved_state, state_at
from jmp_train.errors import UsageError
from jmp_train.records.checkpoints import DoesNotFit, Restored
from jmp_train.records.provenance import package_versions
from jmp_train.reports.progress import print_line
from jmp_train.reports.stages import stage
from jmp_train.runs.build import Parts, abstract_state, first_state
from jmp_train.runs.changes import differences, refused, reordering
from jmp_train.runs.context import RunContext
from jmp_train.runs.directory import changed_since, open_checkpoints
from jmp_train.runs.early_stop import EarlyStop
from jmp_train.runs.other_storage import restore_stored_otherwise
from jmp_train.step.state import TrainState
from jmp_train.step.step import no_skip
from jmp_train.types import Json


class Start(NamedTuple):
    """The point that a run starts from."""

    step: int
    state: TrainState
    data: Json | None  # state of the data's iterator; None at the beginning
    wall_time_s: float  # spent before
    train_time_s: float
    rollbacks: int = 0  # so far
    early_stop: EarlyStop = EarlyStop()
    ended: Json | None = None  # how a hook ended the run: by, step and reason
    window: Json | None = None  # metrics since the last record
    batches_left_out: int = 0  # batches that are passed over, after those of `data`


def find_start(context: RunContext) -> Start:
    """Return the newest checkpoint that can be loaded, else the beginning.

    Raises:
      UsageError: if that checkpoint was saved with settings that only --force changes, or holds
        another state.
      NoUsableCheckpoint: if there are checkpoints and none can be loaded.
    """
    experiment, run_dir = context.experiment, context.run_dir
    changed: dict[str, str] = {}
    before: Json = {}

    def check(step: int, extra: Json) -> None:
        nonlocal before, changed
        before = flatten(extra["config"])
        changed = changed_since(before, context.name, experiment)
        refusals = refused(changed, before, context.asked_warmup)
        if refusals and not context.force:
            raise UsageError(
                f"{run_dir / 'checkpoints' / str(step)} was saved with other settings: "
                f"{', '.join(refusals)}; move it away, or give --force to resume from it"
            )

    with stage(context.console, "initialising"):
        state = first_state(experiment, context.parts)
    try:
        with _restoring(context):
            restored = context.checkpoints.restore_latest(state, check=check)
    except DoesNotFit as error:
        restored = _restore_with_other_skips(context, state, check)
        restored = restored or restore_stored_otherwise(context, state, before)
        if restored is None:
            raise UsageError(f"{run_dir}: {error}") from None
    if restored is None:
        return Start(0, state, None, 0.0, 0.0)
    step, extra = restored.step, restored.extra
    versions = differences(extra["versions"], package_versions())
    if versions:
        print_line(context.console, f"saved by other versions: {', '.join(versions.values())}")
    other_metric = {"early_stop.metric", "early_stop.best"} & changed.keys()
    continues = context.force or any(k == "steps" or k.startswith("early_stop.") for k in changed)
    return Start(
        step,
        restored.state,
        _data_position(context, step, extra, reordering(changed)),
        extra["wall_time_s"],
        extra["train_time_s"],
        extra["rollbacks"],
        early_stop=EarlyStop() if other_metric else EarlyStop(**extra.get("early_stop", {})),
        ended=None if continues else extra.get("ended"),
        window=extra.get("window"),  # an earlier version had none
    )


def _restoring(context: RunContext) -> contextlib.AbstractContextManager[None]:
    if not context.checkpoints.steps():
        return contextlib.nullcontext()
    return stage(context.console, "restoring a checkpoint")


def _data_position(context: RunContext, step: int, extra: Json, changed: list[str]) -> Json:
    """Return the saved state of the data's iterator, or one for batches in another order."""
    if not changed:
        return saved_state(extra["data"], flatten(extra["config"]))
    names = ", ".join(changed)
    print_line(context.console, f"other batches from step {step} on, for {names} changed")
    return state_at(step)


def _restore_with_other_skips(
    context: RunContext, state: TrainState, check: Callable[[int, Json], None]
) -> Restored | None:
    """Restore a checkpoint of a run that skipped steps for one that does not, or vice versa."""
    other = no_skip(state.params, state.model_state) if state.last_skip is None else None
    try:
        restored = context.checkpoints.restore_latest(state._replace(last_skip=other), check=check)
    except DoesNotFit:
        return None
    if restored is None:
        return None
    return restored._replace(state=restored.state._replace(last_skip=state.last_skip))


def finished_summary(run_dir: Path, start: Start, steps: int) -> Json | None:
    """Return the summary of a run that has nothing left to do; None for any other."""
    if start.step < steps and start.ended is None:
        return None
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        return summary if summary["steps"] == start.step and summary["eval"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def restore_newest(run_dir: Path, experiment: AnyExperiment, parts: Parts) -> Restored:
    """Restore the newest checkpoint of a run, to use its parameters.

    Raises:
      UsageError: if the run has no checkpoint, or the newest one does not match the model.
      NoUsableCheckpoint: if none can be loaded.
    """
    restored = None
    if (run_dir / "checkpoints").is_dir():
        # By shapes alone: to compute a first state would take as much memory again, and time.
        like = abstract_state(experiment, parts)
        with contextlib.closing(open_checkpoints(run_dir, experiment)) as checkpoints:
            try:
                restored = checkpoints.restore_latest(like)
            except DoesNotFit as error:
                raise UsageError(f"{run_dir}: {error}") from None
    if restored is None:
        raise UsageError(f"{run_dir} has no checkpoint; expected the directory of a run")
    return restored
