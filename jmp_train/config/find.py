"""Finding an experiment by its name."""

from __future__ import annotations

import importlib
import re
import reprlib
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from jmp_train.config.experiment import Experiment
from jmp_train.errors import UsageError, nearest


def experiment_folders() -> list[Path]:
    """Where experiments are looked for: `experiments/` here, then the one beside the package."""
    roots = [Path.cwd(), Path(__file__).resolve().parents[2]]
    folders = [root / "experiments" for root in dict.fromkeys(roots)]
    return [folder for folder in folders if folder.is_dir()]


def experiment_files() -> dict[str, Path]:
    """The experiments by name, sorted: the files that set EXPERIMENT; nothing is run to find them.

    A file beside them that does not, such as mlp.py, may hold what a family shares.
    """
    files: dict[str, Path] = {}
    for folder in experiment_folders():
        for path in folder.glob("[a-z]*.py"):
            if path.stem not in files and _sets_experiment(path):
                files[path.stem] = path
    return dict(sorted(files.items()))


def _sets_experiment(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return path.is_file()  # so that running it says what is wrong; a folder is passed over
    return re.search(r"^EXPERIMENT\b.*=", text, re.MULTILINE) is not None


def find_experiment(name: str) -> Experiment[Any, Any]:
    """The experiment of a name.

    Args:
      name: a file of an `experiments/` folder, without its folder and ending.

    Raises:
      UsageError: for a name that is none, with the nearest that is; for a file that cannot be run
        or sets EXPERIMENT to something else.
    """
    files = experiment_files()
    if name not in files:
        family = [n for n in files if n.startswith(name + "_")]
        if family and re.fullmatch(r"\w+", name):
            raise UsageError(f"{name!r} is a family; its experiments are {', '.join(family)}")
        hint = nearest(name, files) if files else "there is no experiments/ folder here"
        raise UsageError(f"unknown experiment {name!r}; {hint} (jmp-train list shows all)")
    # One package over all the folders, whether or not one of them is a package of its own.
    package = types.ModuleType("experiments")
    package.__path__ = [str(folder) for folder in experiment_folders()]
    sys.modules["experiments"] = package
    sys.modules.pop(f"experiments.{name}", None)
    try:
        experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(files[name])]
        where = f" (line {lines[-1]})" if lines else ""
        raise UsageError(f"{files[name]} cannot be run: {what}{where}") from error
    if not isinstance(experiment, Experiment):
        raise UsageError(
            f"{files[name]} sets EXPERIMENT to {reprlib.repr(experiment)}; expected an Experiment"
        )
    return experiment
