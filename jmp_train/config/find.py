"""Search for experiments by name."""

from __future__ import annotations

import importlib
import re
import reprlib
import sys
import traceback
import types
from pathlib import Path

from jmp_train.config.experiment import AnyExperiment, Experiment
from jmp_train.config.family import member, names_in
from jmp_train.errors import UsageError, nearest

_running: list[str] = []  # modules of experiments that are being imported: one may look for another


def experiment_folders() -> list[Path]:
    """Return the existing folders `experiments/`: in the current folder, then the bundled one.

    The bundled one is beside the package in a checkout, and inside the package where it is installed.
    """
    package = Path(__file__).resolve().parents[1]
    installed = (package / "experiments").is_dir()  # another package may have that folder beside it
    roots = [Path.cwd(), package if installed else package.parent]
    folders = [root / "experiments" for root in dict.fromkeys(roots)]
    return [folder for folder in folders if folder.is_dir()]


def experiment_files() -> dict[str, Path]:
    """Return the file of each experiment by name, sorted; no file is executed.

    For equal names, the current folder precedes the folder beside the package; within a folder, a
    file that sets `EXPERIMENT` precedes a member of a family.
    """
    files: dict[str, Path] = {}
    hidden: set[str] = set()  # families of an earlier folder, which replace those of a later one
    for folder in experiment_folders():
        paths = [path for path in sorted(folder.glob("[a-z]*.py")) if path.stem not in hidden]
        found = [(name, path) for path in paths for name in _names(path)]
        for name, path in sorted(found, key=lambda pair: pair[0] != pair[1].stem):
            files.setdefault(name, path)
        hidden |= {path.stem for _, path in found}
    return dict(sorted(files.items()))


def _names(path: Path) -> list[str]:
    try:
        return names_in(path)
    except OSError:
        # An unreadable file is listed, so that running it reports the error; a folder is not.
        return [path.stem] if path.is_file() else []


def find_experiment(name: str) -> AnyExperiment:
    """Return the experiment with a name.

    Args:
      name: the stem of a file in an `experiments/` folder that sets `EXPERIMENT`; or the stem of a
        file that sets `FAMILY`, followed by `_` and a precision.

    Raises:
      UsageError: for an unknown name, with the nearest known name; if the file cannot be executed
        or does not set an Experiment.

    >>> find_experiment("mlp_bf16").policy
    'mixed_bfloat16'
    """
    files = experiment_files()
    if name not in files:
        family = [n for n in files if n.startswith(name + "_")]
        if family and re.fullmatch(r"\w+", name):
            raise UsageError(f"{name!r} is a family; its experiments are {', '.join(family)}")
        hint = nearest(name, files) if files else "the current folder has no experiments/ folder"
        raise UsageError(f"unknown experiment {name!r}; {hint} (jmp-train list shows all)")
    path = files[name]
    alone = path.stem == name
    module = _run(path)
    variable = "EXPERIMENT" if alone else "FAMILY"
    experiment = getattr(module, variable, None)
    if not isinstance(experiment, Experiment):
        raise UsageError(
            f"{path} sets {variable} to {reprlib.repr(experiment)}; expected an Experiment"
        )
    if alone:
        return experiment
    own = getattr(module, "PRECISIONS", {})
    listed = names_in(path)
    for suffix in own if isinstance(own, dict) else ():
        if own[suffix] is not None and f"{path.stem}_{suffix}" not in listed:
            raise UsageError(
                f"{path}: PRECISIONS has {suffix!r}, which is not in the text of the file; expected a "
                "dict literal with text keys, so that names are known before the file runs"
            )
    try:
        return member(experiment, own, name[len(path.stem) + 1 :])
    except ValueError as error:
        raise UsageError(f"{path}: PRECISIONS: {error}") from None


def _run(path: Path) -> types.ModuleType:
    """Import an experiment file again, even if it was imported before."""
    # One package for all folders, so that their files can import each other; the folder of this file
    # first, because another may have a file of the same name.
    package = types.ModuleType("experiments")
    folders = dict.fromkeys([path.parent, *experiment_folders()])
    package.__path__ = [str(folder) for folder in folders]
    outer = sys.modules.get("experiments") if _running else None
    for name in [name for name in sys.modules if name.startswith("experiments.")]:
        if name not in _running:
            del sys.modules[name]  # it may be of another folder
    sys.modules["experiments"] = package
    module = f"experiments.{path.stem}"
    _running.append(module)
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f" (line {lines[-1]})" if lines else ""
        raise UsageError(f"{path} cannot be run: {what}{where}") from error
    finally:
        _running.pop()
        if outer is not None:
            sys.modules["experiments"] = outer
