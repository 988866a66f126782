"""The first argument of a command: the name of an experiment or of a family, or a run's directory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from jmp_train.config.find import experiment_files
from jmp_train.errors import UsageError
from jmp_train.runs.directory import read_config
from jmp_train.runs.find import COMPARED, LATEST, NO_RUNS, RUNS, TRAINED, find_run, newest_first


def take_positional(
    arguments: list[str], form: str, what: str, choices: Callable[[], str]
) -> tuple[str, list[str]]:
    """Return the first argument and the rest.

    Args:
      arguments: those of the command.
      form: the command with its argument, such as "train NAME".
      what: what the argument is.
      choices: returns the valid choices, for the message.

    Raises:
      UsageError: if the first argument is missing or an option.
    """
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"expected {what}: jmp-train {form}; {choices()}")
    return arguments[0], arguments[1:]


def take_experiment(arguments: list[str], command: str) -> tuple[str, list[str]]:
    """Return the name of an experiment and the other arguments, as `take_positional` does."""

    def choices() -> str:
        return f"experiments are {', '.join(experiment_files())}"

    return take_positional(arguments, f"{command} NAME", "the name of an experiment", choices)


def take_run(arguments: list[str], command: str) -> tuple[str, list[str]]:
    """Return the argument that names a run and the other arguments, as `take_positional` does."""
    what = "the directory of a run"
    return take_positional(arguments, f"{command} RUN_DIR", what, _newest_runs)


def choose_run(given: str) -> Path:
    """Return the run directory that an argument names; print it to standard error if it was chosen.

    Raises:
      UsageError: as `find_run`.
    """
    run_dir = find_run(given)
    if run_dir != Path(given):
        print(f"run {run_dir}, the newest of {RUNS if given == LATEST else given}", file=sys.stderr)
    return run_dir


def _newest_runs() -> str:
    """Return the end of a message that names the newest runs."""
    found = []
    for run in newest_first(RUNS, *TRAINED, COMPARED):
        with contextlib.suppress(UsageError):  # skips a run that cannot be read
            found.append(f"{run} ({read_config(run)[0]})")
        if len(found) == 3:
            break
    if not found:
        return NO_RUNS
    newest = "run is" if len(found) == 1 else "runs are"
    return f"the newest {newest} {', '.join(found)}"
