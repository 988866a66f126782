"""Tables in CSV and Parquet files, as arrays in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jmp_train.data.dataset import DataError
from jmp_train.data.files import check_file, check_memory, within
from jmp_train.errors import nearest

_ENDINGS = (".csv", ".parquet")


def table(
    path: str,
    held_out: str | None = None,
    label: str | None = None,
    target: str | None = None,
    columns: tuple[str, ...] = (),
    inputs: str = "x",
) -> Any:
    """Return the columns of CSV or Parquet files as arrays, for `jt.Data`.

    Args:
      path: a .csv file with names in its first line, a .parquet file, or a folder of either, whose
        files have the same columns and are read in the order of their names.
      held_out: the same, with the held-out rows; None: a fraction of `path` is held out.
      label: column of classes: integers from 0, or texts, which are numbered in sorted order; None: there
        is none.
      target: column of numbers to predict; None: there is none.
      columns: columns of the inputs; none given: all others, which are numbers then.
      inputs: name of the array of the inputs.

    Returns:
      A dict of the inputs, float32 (rows, columns); `label`, int32 (rows,); and `target`, float32
      (rows,). With `held_out`, a pair of them.

    Raises:
      DataError: for a missing or damaged file; a missing column, with the nearest one; a value that is
        missing, not a number or not finite, with its row; without PyArrow.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "flowers.csv"
    >>> _ = file.write_text("length,width,name\\n5.1,3.5,setosa\\n7.0,3.2,versicolor\\n")
    >>> arrays = table(str(file), label="name")
    >>> arrays["x"].shape, arrays["label"]
    ((2, 2), array([0, 1], dtype=int32))
    """
    if label is not None and label == target:
        raise DataError(f"label and target are both {label!r}; expected different columns")
    if inputs in ("label", "target", "mask"):
        raise DataError(f"inputs is {inputs!r}; expected another name for the array of the inputs")
    wanted = _Wanted(label, target, columns, inputs)
    train = wanted.arrays(Path(path))
    return train if held_out is None else (train, wanted.arrays(Path(held_out)))


class _Wanted:
    """Columns to read; the first table read settles the names of the classes."""

    def __init__(
        self, label: str | None, target: str | None, columns: tuple[str, ...], inputs: str
    ):
        self._label, self._target, self._columns, self._inputs = label, target, columns, inputs
        self._classes: list[str] | None = None

    def arrays(self, path: Path) -> dict[str, np.ndarray]:
        """Return the arrays of a file or of a folder."""
        files = _files(path)
        parts = [self._of_file(file) for file in files]
        columns = parts[0][0]
        for file, (others, arrays) in zip(files, parts, strict=True):
            if "label" in arrays and arrays["label"].dtype.kind != parts[0][1]["label"].dtype.kind:
                raise DataError(
                    f"{file}: {self._label!r} has another type than in {files[0].name}; expected "
                    "integers in all files, or texts"
                )
            if others != columns:
                raise DataError(
                    f"{file} has the inputs {', '.join(others)}; expected {', '.join(columns)}, as "
                    f"{files[0].name}"
                )
        self._columns = tuple(columns)
        joined = {
            name: np.concatenate([arrays[name] for _, arrays in parts]) for name in parts[0][1]
        }
        if not len(joined[self._inputs]):
            raise DataError(f"{path} has no rows; expected at least one")
        if "label" in joined:
            joined["label"] = self._numbered(joined["label"], path)
        return joined

    def _of_file(self, file: Path) -> tuple[list[str], dict[str, np.ndarray]]:
        """Return the names of the inputs' columns and the arrays of a file, labels as they are."""
        names, read = _open(file)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{file} has the column {twice!r} twice; expected different names")
        special = [name for name in (self._label, self._target) if name is not None]
        chosen = [*self._columns, *special]
        for name in chosen:
            if chosen.count(name) > 1:
                raise DataError(f"the column {name!r} is named twice; expected different columns")
        for name in (*special, *self._columns):
            if name not in names:
                raise DataError(f"{file} has no column {name!r}; {nearest(name, names)}")
        inputs = list(self._columns) or [name for name in names if name not in special]
        if not inputs:
            raise DataError(f"{file} has no columns beside {', '.join(special)}; expected inputs")
        found = read([*inputs, *special])
        x = np.empty((found.num_rows, len(inputs)), np.float32)
        for index, name in enumerate(inputs):
            x[:, index] = _numbers(file, name, found[name])
        arrays = {self._inputs: x}
        if self._target is not None:
            arrays["target"] = _numbers(file, self._target, found[self._target])
        if self._label is not None:
            arrays["label"] = _labels(file, self._label, found[self._label])
        return inputs, arrays

    def _numbered(self, labels: np.ndarray, path: Path) -> np.ndarray:
        """Return integers for labels; texts are numbered in the order of the first table's."""
        texts = labels.dtype.kind == "O"
        if self._classes is not None and bool(self._classes) != texts:
            raise DataError(
                f"{path}: {self._label!r} has {'texts' if texts else 'integers'}; expected "
                f"{'texts' if self._classes else 'integers'}, as in the training rows"
            )
        if not texts:
            self._classes = []
            return labels
        names = self._classes or sorted(set(labels.tolist()))
        self._classes = names
        numbers = {name: number for number, name in enumerate(names)}
        for row, name in enumerate(labels.tolist()):
            if name not in numbers:
                raise DataError(
                    f"{path}: row {row + 1}: {self._label!r} is {name!r}, no class of the training "
                    f"rows; {nearest(name, names)}"
                )
        return np.fromiter((numbers[name] for name in labels.tolist()), np.int32, len(labels))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if path.suffix.lower() not in _ENDINGS:
            check_file(path, path.suffix or ".csv")
            raise DataError(f"the table is {str(path)!r}; expected a .csv or .parquet file")
        check_file(path, path.suffix)
        return [path]
    found = sorted(f for f in path.iterdir() if f.suffix.lower() in _ENDINGS and f.is_file())
    for file in found:
        if not within(file, path):
            raise DataError(f"{file} is a link that leads out of {path}; expected a file in it")
    kinds = {f.suffix.lower() for f in found}
    if len(kinds) != 1:
        what = "both .csv and .parquet files" if kinds else "no .csv and no .parquet files"
        raise DataError(f"{path} has {what}; expected files of one kind")
    return found


def _open(file: Path) -> tuple[list[str], Callable[[Sequence[str]], Any]]:
    """Return the names of a file's columns, and a function that reads some of them."""
    try:
        import pyarrow
        from pyarrow import csv, parquet
    except ImportError:
        raise DataError(
            f"{file} is a table; expected PyArrow: pip install 'jmp-train[tables]'"
        ) from None

    def guarded(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"{file} cannot be read: {what}") from error

    if file.suffix.lower() == ".csv":
        check_memory(file, file.stat().st_size)
        whole = guarded(lambda: csv.read_csv(file))
        return whole.column_names, whole.select
    opened = guarded(lambda: parquet.ParquetFile(file, memory_map=True))

    def read(names: Sequence[str]) -> Any:
        check_memory(file, opened.metadata.num_rows * len(names) * 8)
        return guarded(lambda: opened.read(list(names)))

    return opened.schema_arrow.names, read


def _numbers(file: Path, name: str, column: Any) -> np.ndarray:
    """Return a column as float32.

    Raises:
      DataError: for another type, and for a value that is missing or not finite.
    """
    import pyarrow.types as of

    kind = column.type
    if not (of.is_integer(kind) or of.is_floating(kind) or of.is_boolean(kind)):
        raise DataError(
            f"{file}: {name!r} is {kind}; expected numbers: choose columns (--data.columns), or make "
            "it the label (--data.label)"
        )
    _refuse_missing(file, name, column)
    values = np.asarray(column.to_numpy())
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    bad = ~np.isfinite(narrow)
    if bad.any():
        row = int(bad.argmax())
        raise DataError(
            f"{file}: row {row + 1}: {name!r} is {values[row]}; expected a finite number of float32"
        )
    return narrow


def _labels(file: Path, name: str, column: Any) -> np.ndarray:
    """Return a column as int64 or as Python texts."""
    import pyarrow.types as of

    _refuse_missing(file, name, column)
    if of.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if of.is_integer(column.type) or of.is_boolean(column.type):
        return np.asarray(column.to_numpy()).astype(np.int64)
    if of.is_string(column.type) or of.is_large_string(column.type):
        texts = np.array(column.to_pylist(), dtype=object)
        if "" in texts:
            row = texts.tolist().index("")
            raise DataError(f"{file}: row {row + 1} has no {name!r}; expected a value in each row")
        return texts
    raise DataError(f"{file}: {name!r} is {column.type}; expected integers or texts as labels")


def _refuse_missing(file: Path, name: str, column: Any) -> None:
    if column.null_count:
        row = int(np.asarray(column.is_null().to_numpy()).argmax())
        raise DataError(f"{file}: row {row + 1} has no {name!r}; expected a value in each row")
