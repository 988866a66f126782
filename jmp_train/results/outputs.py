"""Files of results: written whole or not at all, and never over another file unasked."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jmp_train.errors import UsageError, nearest
from jmp_train.records.metrics import strict_json


@contextlib.contextmanager
def whole_files(paths: list[Path], *, force: bool) -> Iterator[list[Path]]:
    """Give a temporary path for each file, and rename all of them at the end.

    Args:
      paths: the files, the last of which is renamed last.
      force: whether to write over existing files.

    Raises:
      UsageError: for an existing file without `force`, and where the disk is full or the folder cannot
        be written; nothing half written is left.
    """
    check_free(paths, force=force)
    partial = [path.with_name(path.name + ".partial") for path in paths]
    try:
        for folder in {path.parent for path in paths}:
            folder.mkdir(parents=True, exist_ok=True)
        yield partial
        for path in partial:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for source, target in zip(partial, paths, strict=True):
            os.replace(source, target)
    except OSError as error:
        raise UsageError(f"{paths[0]} cannot be written: {error.strerror or error}") from None
    finally:
        for path in partial:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def check_free(paths: list[Path], *, force: bool) -> None:
    """Raise UsageError for a path that cannot become a file, and for an existing file without `force`."""
    for path in paths:
        folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise UsageError(f"{path} cannot be written: no file can be made in {folder}")
        if path.is_dir():
            raise UsageError(f"{path} is a folder; expected the name of a file")
        if os.path.lexists(path) and not force:
            raise UsageError(f"{path} exists; expected another name, or --force to write over it")


def check_ending(path: Path) -> None:
    """Raise UsageError for a file of predictions that is of no known kind."""
    if path.suffix not in WRITERS:
        hint = nearest(path.suffix.lower(), WRITERS)
        raise UsageError(f"the output {str(path)!r} has the ending {path.suffix!r}; {hint}")


def write_predictions(
    path: Path, predictions: dict[str, np.ndarray], files: list[str] | None, *, force: bool
) -> None:
    """Write predictions to a file whose ending is one of `WRITERS`.

    Args:
      path: the file.
      predictions: arrays by name, one row per example.
      files: the file of each example, for a column `file`; None for none.
      force: whether to write over an existing file.

    Raises:
      UsageError: as `whole_files`.
    """
    named = {} if files is None else {"file": np.array(files)}
    with whole_files([path], force=force) as (partial,):
        WRITERS[path.suffix]({**named, **predictions}, partial)


def _write_npz(arrays: dict[str, np.ndarray], path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:  # numpy.savez has names of arguments of its own
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, _standard(array), allow_pickle=False)


def _write_csv(arrays: dict[str, np.ndarray], path: Path) -> None:
    flat = {name: _standard(array).reshape(len(array), -1) for name, array in arrays.items()}
    header = [
        name if arrays[name].ndim == 1 else f"{name}.{i}"
        for name, array in flat.items()
        for i in range(array.shape[1])
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in zip(*(array.tolist() for array in flat.values()), strict=True):
        writer.writerow([value for values in row for value in values])
    # The name of a file may have bytes that are not UTF-8.
    path.write_text(text.getvalue(), encoding="utf-8", errors="backslashreplace")


def _rows(arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    columns = {name: strict_json(_standard(array)) for name, array in arrays.items()}
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _write_json(arrays: dict[str, np.ndarray], path: Path) -> None:
    path.write_text(json.dumps(_rows(arrays), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _write_jsonl(arrays: dict[str, np.ndarray], path: Path) -> None:
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in _rows(arrays)]
    path.write_text("".join(lines), encoding="utf-8")


def _standard(array: np.ndarray) -> np.ndarray:
    """Return an array in a dtype that files know: bfloat16 and the like become float32, exactly."""
    return array.astype(np.float32) if array.dtype.kind == "V" else array


WRITERS: dict[str, Callable[[dict[str, np.ndarray], Path], None]] = {
    ".npz": _write_npz,
    ".csv": _write_csv,
    ".json": _write_json,
    ".jsonl": _write_jsonl,
}
