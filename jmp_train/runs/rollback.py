"""Rolling a run that diverged back to its newest checkpoint, past the batches that it diverged on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

from jmp_train.records.checkpoints import NotSaved
from jmp_train.reports.progress import print_line
from jmp_train.runs.context import RunContext
from jmp_train.runs.investigate import explain
from jmp_train.runs.loop import Diverged
from jmp_train.runs.processes import several
from jmp_train.runs.resume import Start, find_start

T = TypeVar("T")

MAX_ROLLBACKS = 10  # of a whole run; beyond this, the cause is not a single bad batch


def with_rollbacks(attempt: Callable[[Start], T], context: RunContext, start: Start) -> T:
    """Return the result of an attempt to train, made again after each rollback.

    Args:
      attempt: trains from a start to the end.
      context: the run; only one whose `nonfinite` is "rollback" is rolled back.
      start: of the first attempt.

    Raises:
      Diverged: with the whole report, if rollback is off, or the limit is reached.
    """
    while True:
        try:
            return attempt(start)
        except Diverged as error:
            if error.last is None:
                raise
            with contextlib.suppress(NotSaved):  # the divergence matters more than a lost save
                context.checkpoints.wait()
            if context.experiment.nonfinite != "rollback" or start.rollbacks >= MAX_ROLLBACKS:
                if several():  # a replay needs the whole state in one process
                    raise
                raise explain(context, error) from None
            reason, bad = str(error), error.last.bad
        # Here the error is gone, and with it the state that diverged.
        before, start = start, find_start(context)
        context.checkpoints.set_aside_after(start.step)
        batches = bad - start.step
        if start.step == before.step:  # its data has no record of what was left out since
            batches += before.batches_left_out
        print_line(
            context.console,
            f"{reason}: rolled back to step {start.step}; skipping the next {batches} batches",
        )
        start = start._replace(rollbacks=before.rollbacks + 1, batches_left_out=batches)
