"""What a run does at the events of its loop: records, evaluations, checkpoints, hooks."""

from __future__ import annotations

import time

import jax

from jmp_train.data.bad import SKIPPED, Bad
from jmp_train.data.batches import Batches, state_at
from jmp_train.optim.schedules import make_schedule
from jmp_train.records.provenance import package_versions
from jmp_train.records.trackers import Trackers
from jmp_train.reports.progress import RunProgress, print_line
from jmp_train.runs.context import RunContext
from jmp_train.runs.directory import config_json
from jmp_train.runs.early_stop import metric_of
from jmp_train.runs.loop import Asked
from jmp_train.runs.processes import Lost, total
from jmp_train.runs.resume import Start
from jmp_train.runs.window import Window
from jmp_train.step.state import TrainState
from jmp_train.types import Json


class Events:
    """What a run does at the events of its loop.

    Args:
      context: the run.
      start: where this part of it starts.
      trackers: they get the records.
      progress: it shows them.
      batches: the iterator of the data, whose position is saved.
      window: the sums of the metrics since the last record, which are saved too.
    """

    def __init__(
        self,
        context: RunContext,
        start: Start,
        trackers: Trackers,
        progress: RunProgress,
        batches: Batches,
        window: Window,
    ):
        self._context, self._start = context, start
        self._trackers, self._progress, self._batches = trackers, progress, batches
        self._window = window
        experiment = context.experiment
        schedule = experiment.schedule or make_schedule(experiment.optimizer, experiment.steps)
        self._learning_rate = jax.jit(schedule)
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self._early = start.early_stop
        self._saved: Json = start.data or state_at(0)  # the last state of the data
        self._skipped_before = self._saved.get(SKIPPED, 0)
        self._first = self._saved["next_batch"] + start.batches_left_out
        self._warned: set[str] = set()
        self.ended = start.ended  # why the run ended before its last step
        self.error: Exception | None = None  # of `on_record`

    def log(self, step: int, values: Json, state: TrainState) -> Asked:
        """Record the values of a training step."""
        # A skipped step does not count for the schedule. The last update had the count before it.
        before = step - values["skipped_steps"] - (values["skipped_in_row"] == 0)
        values = {**values, "learning_rate": float(self._learning_rate(before))}
        count = self.skipped_examples
        if count:
            values["skipped_examples"] = count
            self._warn(self._batches.bad, "training")
        self._trackers.record(step, "train", values)
        self._progress.train(step, values)
        return self._on_record(step, "train", values, state)

    def evaluate(self, step: int, state: TrainState) -> Asked:
        """Evaluate, record the metrics, and decide on early stopping."""
        metrics = self._measure(step, state)
        asked = self._on_record(step, "eval", metrics, state)
        config = self._context.experiment.early_stop
        if config.metric is None:
            return asked
        experiment = self._context.experiment
        highest = config.highest(experiment.metric, experiment.highest)
        value = metric_of(config, metrics)
        self._early = self._early.after(config, step, value, highest=highest)
        reason = self._early.reason(config)
        if reason:
            return self._end("early_stop", step, reason)
        return asked or ("save" if self._early.best_step == step else None)

    def checkpoint(self, step: int, state: TrainState, seconds: float) -> None:
        """Save the state, after the records up to it: a resume leaves no gap."""
        context, start = self._context, self._start
        failure: OSError | None = None
        try:
            self._trackers.flush()
        except OSError as error:
            failure = error
        if total(int(failure is not None)):  # the first process writes the records of all
            failure = failure or OSError("the first process could not write its records")
            context.checkpoints.give_up(step, failure)
            return
        position = self._position(step)
        skipped = self._of_all(position.get(SKIPPED, 0))
        extra = {
            "config": config_json(context.name, context.experiment),
            "versions": package_versions(),
            "data": {**position, SKIPPED: skipped} if skipped else position,
            "wall_time_s": start.wall_time_s + time.perf_counter() - context.began,
            "train_time_s": start.train_time_s + seconds,
            "rollbacks": start.rollbacks,
            "early_stop": self._early._asdict(),
            "ended": self.ended,
            "window": self._window.state(),
        }
        context.checkpoints.save(
            step,
            state,
            extra=extra,
            metrics=self.metrics_at(step) or None,
            wait=context.experiment.checkpoint_wait,
        )

    def _position(self, step: int) -> Json:
        """Return the state of the data before the batch of the next step.

        After an error in the data, more batches may have been read than steps were taken.
        """
        batches, wanted = self._batches, self._first + step - self._start.step
        state = batches.get_state()
        if state["next_batch"] != wanted:
            if not batches.can_seek:  # a resumed run reads them again up to it
                return state_at(wanted)
            before = batches.before
            if before is not None and before["next_batch"] == wanted:
                batches.set_state(before)
            else:
                batches.set_state(self._saved)
                batches.skip(wanted - self._saved["next_batch"])
            state = batches.get_state()
        self._saved = state
        return state

    def metrics_at(self, step: int) -> dict[str, float]:
        """Return the metrics of a step if it was the last to be evaluated, else {}."""
        return self._evaluated[1] if self._evaluated[0] == step else {}

    def metrics_of_the_end(self, step: int, state: TrainState) -> dict[str, float]:
        """Return the metrics of the last step; one at which a hook ended the run is evaluated now."""
        if self.ended and not self.metrics_at(step):
            self._measure(step, state)
        return self.metrics_at(step)

    def _measure(self, step: int, state: TrainState) -> dict[str, float]:
        metrics = self._context.parts.evaluate(state)
        if self._context.parts.left_out:
            self._warn(self._context.parts.left_out[0], "held-out")
        self._evaluated = (step, metrics)
        self._trackers.record(step, "eval", metrics)
        self._progress.evaluation(step, metrics)
        return metrics

    @property
    def skipped_examples(self) -> int:
        """Number of training examples that were left out so far, by all processes."""
        return self._of_all(self._batches.bad.count)

    def _of_all(self, own: int) -> int:
        """Return the number of examples that all processes left out, from that of this one."""
        train = self._context.parts.dataset.train
        if not getattr(train, "counts_apart", False):
            return own  # what one process reads, all of them read
        return self._skipped_before + total(own - self._skipped_before)

    def _warn(self, bad: Bad, which: str) -> None:
        """Say once for each kind of examples that some are left out, with the first reason."""
        if which not in self._warned and bad.why:
            self._warned.add(which)
            line = f"left out {which} examples that cannot be used, the first: {bad.why}"
            print_line(self._context.console, line)

    def _on_record(self, step: int, split: str, values: Json, state: TrainState) -> Asked:
        """Call the experiment's `on_record`; its exception is raised after the checkpoint.

        The processes of a run stop together, if one of them asks for it or fails.
        """
        on_record = self._context.experiment.on_record
        if on_record is None or self.error is not None:
            return None
        answer = None
        try:
            answer = on_record({"step": step, "split": split, **values}, state)
            if answer not in (None, "stop"):
                raise ValueError(f"on_record returned {answer!r}; expected None or 'stop'")
        except Exception as error:  # noqa: BLE001
            self.error = error
        if total(int(self.error is not None)):
            self.error = self.error or Lost()
            return "stop"
        stop = total(int(answer is not None))
        return self._end("on_record", step, "on_record returned 'stop'") if stop else None

    def _end(self, by: str, step: int, reason: str) -> Asked:
        if step < self._context.experiment.steps:
            self.ended = {"by": by, "step": step, "reason": reason}
        return "stop"
