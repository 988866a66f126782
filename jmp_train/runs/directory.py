"""The directory of a run: its config.json, its checkpoints, and what is refused."""

from __future__ import annotations

import itertools
import json
import unicodedata
import uuid
from collections.abc import Mapping, Sized
from pathlib import Path

from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.settings import default_settings, flatten, settings_in
from jmp_train.data.dataset import Dataset
from jmp_train.errors import UsageError
from jmp_train.records.checkpoints import Checkpoints
from jmp_train.records.metrics import replace_text, strict_json, write_json
from jmp_train.runs.changes import differences, refused
from jmp_train.spec import DataSpec
from jmp_train.types import Json

# Left by a process that was killed before its run began, or written by `profile`.
_NO_RUN = {"lock", "config.json.partial", "profile"}
_EXAMPLES = "examples"  # a key of spec.json


def read_config(run_dir: Path) -> tuple[str, Json]:
    """Return the name of a run's experiment, and its settings by dotted path.

    Raises:
      UsageError: if the directory is not a run directory, or its config.json cannot be read.
    """
    path = run_dir / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
            kind = kinds.get(type(values), "a number")
            raise UsageError(f"{path} contains {kind}; expected an object, as a run writes it")
        name = values.pop("experiment")
        if not isinstance(name, str):
            raise UsageError(
                f"{path} cannot be read: experiment is {name!r}; expected the name of one"
            )
        return name, flatten(values)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{run_dir} is not a run directory; expected a directory with config.json"
        ) from None
    except KeyError:
        raise UsageError(f"{path} cannot be read: it names no experiment") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is damaged: {error}; expected it as the run wrote it: restore it from a copy, or "
            "train in another folder"
        ) from None


def config_json(name: str, experiment: AnyExperiment) -> Json:
    """Return the content of config.json."""
    return strict_json({"experiment": name, **settings_in(experiment)})


def write_config(run_dir: Path, name: str, experiment: AnyExperiment) -> None:
    """Write config.json.

    Raises:
      UsageError: if the directory cannot be written.
    """
    try:
        write_json(run_dir / "config.json", config_json(name, experiment))
    except OSError as error:
        raise not_writable(run_dir, error) from None


def write_spec(run_dir: Path, dataset: Dataset) -> None:
    """Write spec.json, from which the model can be built without the data, with the numbers of examples.

    Raises:
      UsageError: if the directory cannot be written.
    """
    values = {**dataset.spec.to_json(), _EXAMPLES: _counts(dataset)}
    try:
        write_json(run_dir / "spec.json", values)
    except OSError as error:
        raise not_writable(run_dir, error) from None


def check_same_data(run_dir: Path, dataset: Dataset, force: bool) -> list[str]:
    """Return what changed in the data since the run of a directory began.

    Compared are the numbers of examples and the names of classes, as far as both are known: a run of an
    earlier version stored neither, and a stream has no number of examples.

    Raises:
      UsageError: for a change without `force`.
    """
    try:
        saved = json.loads((run_dir / "spec.json").read_text(encoding="utf-8"))
        counts, names = saved.get(_EXAMPLES) or {}, saved.get("class_names") or ()
        changed = [
            f"{part} examples {counts[part]} -> {count}"
            for part, count in _counts(dataset).items()
            if counts.get(part, count) not in (count, None) and count is not None
        ]
        now = dataset.spec.class_names or ()
        pairs = itertools.zip_longest(names, now) if names and now else ()
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return []  # written anew when the run resumes
    renamed = (f"class {n} {a!r} -> {b!r}" for n, (a, b) in enumerate(pairs) if a != b)
    changed += itertools.islice(renamed, 1)  # the first, of perhaps a thousand
    if changed and not force:
        raise UsageError(
            f"{run_dir} holds a run on other data: {', '.join(changed)}; expected the same "
            "data, another --run-dir, or --force to resume with these"
        )
    return changed


def _counts(dataset: Dataset) -> dict[str, int | None]:
    """Return the numbers of examples; None for a stream."""
    held_out = dataset.eval
    held_out = next(iter(held_out.values())) if isinstance(held_out, Mapping) else held_out
    parts = {"training": dataset.train, "held-out": held_out}
    return {name: len(x) if isinstance(x, Sized) else None for name, x in parts.items()}


def write_files(run_dir: Path, files: Mapping[str, str]) -> None:
    """Write the files of a run's data, such as tokenizer.json.

    Raises:
      UsageError: if the directory cannot be written.
    """
    try:
        for name, text in files.items():
            replace_text(run_dir / name, text)
    except OSError as error:
        raise not_writable(run_dir, error) from None


def read_spec(run_dir: Path) -> DataSpec | None:
    """Return the spec of a run's data; None for a run of a version that did not store it.

    Raises:
      UsageError: if spec.json cannot be read.
    """
    path = run_dir / "spec.json"
    try:
        return DataSpec.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(
            f"{path} is damaged; remove it to have the spec read from the data again"
        ) from None


def changed_since(saved: Json, name: str, experiment: AnyExperiment) -> dict[str, str]:
    """Return `differences` from saved settings, by dotted path; a setting that is newer than they are
    had its default."""
    defaults = flatten(strict_json(default_settings(experiment)))
    return differences({**defaults, **saved}, flatten(config_json(name, experiment)))


def run_id(run_dir: Path) -> str:
    """Return the id of the run in a directory, which stays the same when the run is resumed.

    Raises:
      UsageError: if the directory cannot be written.
    """
    path = run_dir / "run_id"
    try:
        if not path.exists():
            replace_text(path, uuid.uuid4().hex + "\n")
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise not_writable(run_dir, error) from None


def check_directory(
    run_dir: Path, name: str, experiment: AnyExperiment, asked_warmup: int, force: bool
) -> list[str]:
    """Return the texts of the settings that changed since the run of a directory began.

    Nothing is written.

    Args:
      run_dir: the directory.
      name: the name of the experiment.
      experiment: the experiment to train.
      asked_warmup: the warm-up steps that the experiment asked for, before they were fitted.
      force: allow every change.

    Raises:
      UsageError: if this run must not use the directory.
    """
    check_path(run_dir)
    try:
        if not (run_dir / "config.json").exists():
            if run_dir.exists() and {path.name for path in run_dir.iterdir()} - _NO_RUN:
                raise UsageError(
                    f"{run_dir} is not empty and is not a run directory; expected a new folder, "
                    "or a run's"
                )
            return []
    except OSError as error:
        raise UsageError(f"{run_dir} cannot be read: {error.strerror}") from None
    changed, refusals = changed_settings(run_dir, name, experiment, asked_warmup)
    if "experiment" in changed and not force:
        saved_name, _ = read_config(run_dir)
        raise UsageError(f"{run_dir} holds a run of {saved_name!r}; expected one of {name!r}")
    if refusals and not force:
        raise UsageError(
            f"{run_dir} holds a run with other settings: {', '.join(refusals)}; expected the same "
            "ones, another --run-dir, or --force to resume with these"
        )
    return list(changed.values())


def changed_settings(
    run_dir: Path, name: str, experiment: AnyExperiment, asked_warmup: int
) -> tuple[dict[str, str], list[str]]:
    """Compare the settings of a run with those of an experiment; arguments as in `check_directory`.

    Returns:
      The text of each change by dotted path, "experiment" for its name; and the texts of those that
      only --force allows.

    Raises:
      UsageError: as `read_config`.
    """
    saved_name, saved = read_config(run_dir)
    changed = changed_since({"experiment": saved_name, **saved}, name, experiment)
    return changed, refused(changed, saved, asked_warmup)


def check_path(run_dir: Path) -> None:
    """Raise UsageError for unprintable characters, or for those that Orbax reads as a pattern."""
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in str(run_dir)):
        raise UsageError(f"{str(run_dir)!r} contains unprintable characters; choose another folder")
    if set("[]*?") & set(str(run_dir.resolve())):
        raise UsageError(
            f"{str(run_dir)!r} contains one of the characters []*?; choose another folder"
        )


def open_checkpoints(
    run_dir: Path, experiment: AnyExperiment, *, clean: bool = False
) -> Checkpoints:
    """Open the checkpoints of a run; `clean` as in `Checkpoints`.

    Raises:
      UsageError: if the directory cannot be written.
    """
    early = experiment.early_stop
    try:
        return Checkpoints(
            run_dir / "checkpoints",
            best=early.metric or experiment.metric,
            highest=early.highest(experiment.metric, experiment.highest),
            clean=clean,
        )
    except OSError as error:
        raise not_writable(run_dir, error) from None


def not_writable(run_dir: Path, error: OSError) -> UsageError:
    """Return the error for a directory that cannot be written."""
    return UsageError(f"{run_dir} cannot be written: {error.strerror}")
