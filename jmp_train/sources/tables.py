"""Tables in CSV and Parquet files, as arrays in memory or a few row groups at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jmp_train.errors import DataError
from jmp_train.sources.columns import Columns
from jmp_train.sources.described import Described
from jmp_train.sources.files import check_file, check_memory, named, within
from jmp_train.types import Batch

_ENDINGS = (".csv", ".parquet")


def table(
    path: str,
    held_out: str | None = None,
    label: str | None = None,
    target: str | None = None,
    columns: tuple[str, ...] = (),
    inputs: str = "x",
    in_memory: bool = True,
) -> Any:
    """Return the columns of CSV or Parquet files, for `jt.Data`.

    Args:
      path: a .csv file with names in its first line, a .parquet file, or a folder of either, whose
        files have the same columns and are read in the order of their names.
      held_out: the same, with the held-out rows; None: a fraction of `path` is held out.
      label: column of classes: integers from 0, or texts, which are numbered in sorted order; None: there
        is none.
      target: column of numbers to predict; None: there is none.
      columns: columns of the inputs; none given: all others, which are numbers then.
      inputs: name of the array of the inputs.
      in_memory: whether to hold all columns in memory. If not, Parquet files are read a few row groups
        at a time: each epoch shuffles the row groups, and the rows of each few of them together.

    Returns:
      A dict of the inputs, float32 (rows, columns); `label`, int32 (rows,); and `target`, float32
      (rows,). With `held_out`, a pair of them. Or `RowGroups`, whose examples have these.

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
    wanted = Columns(label, target, columns, inputs)
    read = _in_memory if in_memory else RowGroups
    train = read(named(path), wanted)
    return train if held_out is None else (train, read(named(held_out), wanted))


def _in_memory(path: Path, columns: Columns) -> dict[str, np.ndarray]:
    """Return the arrays of a file or of a folder."""
    files = _files(path)
    opened = [_open(file) for file in files]
    starts = np.cumsum([0, *(sum(table.groups) for table in opened)])
    if not starts[-1]:
        raise DataError(f"{path} has no rows; expected at least one")
    columns.choose([(file, table.names) for file, table in zip(files, opened, strict=True)])
    wanted = [*columns.numeric, *([] if columns.label is None else [columns.label])]
    parts, labels = [], []
    for file, table in zip(files, opened, strict=True):
        found = table.read(wanted)
        parts.append(columns.arrays(file, found))
        labels += [] if columns.label is None else [(file, found[columns.label])]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    arrays.update({"label": columns.number(labels)} if labels else {})
    return Described(arrays, functools.partial(_row_of, files, starts), columns.class_names)


def _row_of(files: list[Path], starts: np.ndarray, index: int) -> str:
    """Return the file and the row of an example; file n begins with row `starts[n]` of all."""
    file = int(np.searchsorted(starts, index, side="right")) - 1
    return f"{files[file]}: row {index - starts[file] + 1}"


class RowGroups:
    """A source of the rows of Parquet files, which holds a few row groups at a time.

    Labels are read at once, the other columns when they are needed.

    Args:
      path: a file, or a folder of files.
      columns: the columns to read.

    Raises:
      DataError: as `table`; for a bad number, when it is read.
    """

    _TOGETHER = 4  # row groups whose rows are shuffled together

    takes_rows = True

    def __init__(self, path: Path, columns: Columns):
        self._columns, self._files = columns, _files(path)
        for file in self._files:
            if file.suffix.lower() != ".parquet":
                raise DataError(f"{file} is read whole; expected in_memory, or a .parquet file")
        tables = [_open(file) for file in self._files]
        columns.choose(
            [(file, table.names) for file, table in zip(self._files, tables, strict=True)]
        )
        self._groups = [  # the number of a file, a row group in it, and the rows before that
            (number, group, sum(table.groups[:group]))
            for number, table in enumerate(tables)
            for group in range(len(table.groups))
        ]
        sizes = [size for table in tables for size in table.groups]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        if not len(self):
            raise DataError(f"{path} has no rows; expected at least one")
        self._labels = None
        if columns.label is not None:
            read = [table.read([columns.label])[columns.label] for table in tables]
            self._labels = columns.number(list(zip(self._files, read, strict=True)))
        self._kept: dict[int, dict[str, np.ndarray]] = {}

    @property
    def classes(self) -> int | None:
        """The number of classes, if they are every integer from 0."""
        found = np.array([0]) if self._labels is None else np.unique(self._labels)
        return len(found) if found[0] == 0 and found[-1] == len(found) - 1 > 0 else None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes, if the labels are texts."""
        return self._columns.class_names

    def describe(self, index: int) -> str:
        """Return the file and the row of an example."""
        block = int(np.searchsorted(self._starts, index, side="right")) - 1
        number, _, before = self._groups[block]
        return f"{self._files[number]}: row {before + index - self._starts[block] + 1}"

    @property
    def blocks(self) -> tuple[np.ndarray, int]:
        """Where row groups begin, and how many are shuffled together."""
        return self._starts, self._TOGETHER

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Batch:
        return {name: array[0] for name, array in self.take(np.array([index])).items()}

    def take(self, rows: np.ndarray) -> Batch:
        """Return the rows with these indices as a batch.

        Raises:
          DataError: for a damaged file, and for a value that is missing or not finite.
        """
        blocks = np.searchsorted(self._starts, rows, side="right") - 1
        found: Batch = {}
        for block in np.unique(blocks).tolist():
            at = np.flatnonzero(blocks == block)
            arrays, number = self._block(block), self._groups[block]
            if not all(
                np.isfinite(array[rows[at] - self._starts[block]]).all()
                for array in arrays.values()
            ):
                for row in (rows[at] - self._starts[block]).tolist():  # which one it is
                    self._columns.check_row(self._files[number[0]], arrays, row, number[2])
            for name, array in arrays.items():
                if name not in found:
                    found[name] = np.empty((len(rows), *array.shape[1:]), array.dtype)
                found[name][at] = array[rows[at] - self._starts[block]]
        return found if self._labels is None else {**found, "label": self._labels[rows]}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}  # for a worker process

    def _block(self, block: int) -> dict[str, np.ndarray]:
        """Return the arrays of a row group; the last few are kept."""
        kept = self._kept  # replaced, never mutated, because threads read beside each other
        if block not in kept:
            number, group, start = self._groups[block]
            file = self._files[number]
            found = _open(file).read(self._columns.numeric, group)
            arrays = self._columns.arrays(file, found, start, check=False)
            recent = dict(list(kept.items())[-self._TOGETHER :])
            kept = self._kept = {**recent, block: arrays}
        return kept[block]


class _Table(NamedTuple):
    """A file that was opened."""

    names: list[str]
    """Of its columns."""
    groups: list[int]
    """The number of rows in each row group."""
    read: Callable[..., Any]
    """`read(names, group=None)` returns columns of a row group, or of the whole file."""


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


def _open(file: Path) -> _Table:
    """Open a file.

    Raises:
      DataError: for a damaged one, and without PyArrow; `read` raises it too.
    """
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
        names = guarded(lambda: whole.column_names)  # decodes them
        return _Table(names, [whole.num_rows], lambda names, _=None: whole.select(names))
    opened = guarded(lambda: parquet.ParquetFile(file, memory_map=True))
    sizes = [opened.metadata.row_group(n).num_rows for n in range(opened.num_row_groups)]

    def read(names: Sequence[str], group: int | None = None) -> Any:
        rows = opened.metadata.num_rows if group is None else sizes[group]
        check_memory(file, rows * len(names) * 8)
        if group is None:
            return guarded(lambda: opened.read(list(names)))
        return guarded(lambda: opened.read_row_group(group, list(names)))

    return _Table(opened.schema_arrow.names, sizes, read)
