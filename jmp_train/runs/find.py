"""Runs that the user names by experiment, as `latest`, or by their settings."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.warmup import fit_warmup
from jmp_train.errors import UsageError, nearest
from jmp_train.runs.directory import changed_settings

log = logging.getLogger(__name__)

RUNS = Path("runs")
NO_RUNS = "runs/ has no runs; start one with jmp-train train NAME"
LATEST = "latest"
TRAINED = ("*", "*/*")
"""Patterns of the runs of `train` in runs/."""
COMPARED = "compare/*/*/runs/*"
"""Pattern of the runs of `compare` in runs/."""


def newest_first(folder: Path, *forms: str) -> list[Path]:
    """Return the run directories in a folder, the newest first.

    The newest run is the one that was started or resumed last: both write its config.json. Runs of the
    same time are in the order of their names, numbers by value. A link to another of these runs is
    left out.

    Args:
      folder: the folder; one that does not exist has no runs.
      forms: patterns of `Path.glob` for run directories.
    """
    if not os.path.isdir(folder):  # false for a path that no folder can have
        return []
    ages: dict[Path, int] = {}
    real: set[Path] = set()
    configs = [path for form in forms for path in folder.glob(f"{form}/config.json")]
    for config in sorted(configs, key=lambda path: path.parent.is_symlink()):
        try:
            age, target = config.stat().st_mtime_ns, config.resolve()
        except OSError:  # it was removed since, or it is a link to nothing
            continue
        if target not in real:
            real.add(target)
            ages[config.parent] = age
    return sorted(ages, key=lambda run: (ages[run], _natural(str(run))), reverse=True)


def _natural(name: str) -> list[str | int]:
    """Return a sort key that compares numbers by value.

    >>> sorted(["a-10", "a", "a-9"], key=_natural)
    ['a', 'a-9', 'a-10']
    """
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))]


def find_run(given: str) -> Path:
    """Return the run directory that an argument of the command line names.

    A path of a run directory comes first, so a run directory `latest` in the current folder is chosen by
    its name.

    Args:
      given: a run directory; a folder of runs, such as runs/NAME, which stands for its newest run;
        or "latest", the newest run in runs/ that is not of a comparison.

    Raises:
      UsageError: if there is no such run, with the nearest choice.
    """
    path = Path(given)
    if os.path.exists(path / "config.json"):  # false for a path that no file can have
        return path
    runs = newest_first(RUNS, *TRAINED)
    found = runs if given == LATEST else newest_first(path, "*")
    if found:
        return found[0]
    if not runs:
        raise UsageError(f"{given} is not a run directory; {NO_RUNS}")
    folders = sorted({str(run.parent if run.parent != RUNS else run) for run in runs})
    raise UsageError(
        f"{given} is not a run directory and contains none; {nearest(given, [LATEST, *folders])}"
    )


def find_resumable(name: str, experiment: AnyExperiment, *, force: bool) -> Path:
    """Return the newest run of an experiment that may be resumed with these settings.

    A run that another process trains is returned too: training there is refused, with its process.

    Args:
      name: the name of the experiment, whose runs are in runs/NAME.
      experiment: the settings to resume with.
      force: take the newest run with any settings.

    Raises:
      UsageError: if there is none; the message says what differs from the newest.
    """
    folder = RUNS / name
    fitted, _ = fit_warmup(experiment)
    asked_warmup = experiment.optimizer.warmup_steps
    refusals: dict[Path, list[str]] = {}
    damage: list[str] = []
    for run in newest_first(folder, "*"):
        try:
            changed, refusals_here = changed_settings(run, name, fitted, asked_warmup)
        except UsageError as error:
            log.warning("%s", error)
            damage.append(str(error))
            continue
        if "experiment" in changed:  # a run of another one, which --run-dir put there
            continue
        if force or not refusals_here:
            return run
        refusals[run] = refusals_here
    if not refusals:
        what = damage[0] if damage else f"{folder} has no runs to resume"
        raise UsageError(f"{what}; start one with jmp-train train {name}")
    newest, differing = next(iter(refusals.items()))
    raise UsageError(
        f"no run in {folder} has these settings (runs there: {len(refusals)}); the newest, {newest}, "
        f"differs: {', '.join(differing)}; expected the options that it was started with, or --force "
        "to resume it with these"
    )
