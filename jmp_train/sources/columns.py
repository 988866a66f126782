"""Columns of tables as arrays: which are read, as what, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jmp_train.errors import DataError, nearest


class Columns:
    """The columns that are read from tables; the first tables settle inputs and names of classes.

    Args:
      label: column of classes, or None.
      target: column of numbers to predict, or None.
      inputs: columns of the inputs; none given: all others.
      name: name of the array of the inputs.
    """

    def __init__(self, label: str | None, target: str | None, inputs: tuple[str, ...], name: str):
        self.label, self.name = label, name
        self._target, self._inputs = target, inputs
        self._classes: list[str] | None = None

    def choose(self, tables: Sequence[tuple[Path, list[str]]]) -> list[str]:
        """Return the columns of the inputs, the same in every table.

        Args:
          tables: files with the names of their columns.

        Raises:
          DataError: for a missing column, with the nearest one; for one that a table has or that is
            named twice; for tables of different inputs.
        """
        found = [self._inputs_of(file, names) for file, names in tables]
        for (file, _), inputs in zip(tables, found, strict=True):
            if inputs != found[0]:
                raise DataError(
                    f"{file} has the inputs {', '.join(inputs)}; expected {', '.join(found[0])}, as "
                    f"{tables[0][0].name}"
                )
        self._inputs = tuple(found[0])
        return found[0]

    def _inputs_of(self, file: Path, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{file} has the column {twice!r} twice; expected different names")
        index = [name for name in names if not name or name.startswith("__index_level_")]
        if index and not self._inputs:
            raise DataError(
                f"{file} has the column {index[0]!r}, an index of pandas; expected index=False when it is "
                "written, or the columns of the inputs (--data.columns)"
            )
        special = [name for name in (self.label, self._target) if name is not None]
        chosen = [*self._inputs, *special]
        for name in chosen:
            if chosen.count(name) > 1:
                raise DataError(f"the column {name!r} is named twice; expected different columns")
        for name in (*special, *self._inputs):
            if name not in names:
                raise DataError(f"{file} has no column {name!r}; {nearest(name, names)}")
        inputs = list(self._inputs) or [name for name in names if name not in special]
        if not inputs:
            raise DataError(f"{file} has no columns beside {', '.join(special)}; expected inputs")
        return inputs

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The texts that are classes, once `number` was called; None for integers."""
        return tuple(self._classes) if self._classes else None

    @property
    def numeric(self) -> list[str]:
        """The columns that `arrays` reads, once the inputs are chosen."""
        return [*self._inputs, *([] if self._target is None else [self._target])]

    def arrays(
        self, file: Path, table: Any, start: int = 0, *, check: bool = True
    ) -> dict[str, np.ndarray]:
        """Return the inputs and the target in a PyArrow table, float32.

        Args:
          file: for messages.
          table: has the columns `numeric`.
          start: number of rows in the file before those of the table.
          check: whether to refuse missing values and those that are not finite; if not, missing ones
            are NaN.

        Raises:
          DataError: for a value that is missing, not a number or not finite, with its row.
        """
        x = np.empty((table.num_rows, len(self._inputs)), np.float32)
        for index, name in enumerate(self._inputs):
            x[:, index] = _numbers(file, name, table[name], start, check)
        if self._target is None:
            return {self.name: x}
        return {
            self.name: x,
            "target": _numbers(file, self._target, table[self._target], start, check),
        }

    def check_row(self, file: Path, arrays: dict[str, np.ndarray], row: int, start: int) -> None:
        """Raise DataError for a row of unchecked arrays with a value that is not finite."""
        parts = [np.ravel(array[row]) for array in arrays.values()]
        values = np.concatenate(parts)
        if not np.isfinite(values).all():
            place = int((~np.isfinite(values)).argmax())
            raise DataError(
                f"{file}: row {start + row + 1}: {self.numeric[place]!r} is {values[place]}; expected a "
                "finite number of float32"
            )

    def number(self, columns: Sequence[tuple[Path, Any]]) -> np.ndarray:
        """Return the labels in the columns of some files, numbered and joined; int32 for texts, else int64.

        Texts have the place of their name among the classes: those of the first call, sorted.

        Raises:
          DataError: for a label that is missing, of another type than in the first file or in the first
            call, or no class of that.
        """
        assert self.label is not None
        parts = [(file, _labels(file, self.label, column)) for file, column in columns]
        first = parts[0][0].name
        texts = parts[0][1].dtype.kind == "O"
        for file, labels in parts:
            if (labels.dtype.kind == "O") != texts:
                raise DataError(
                    f"{file}: {self.label!r} has another type than in {first}; expected integers in "
                    "all files, or texts"
                )
        if self._classes is not None and bool(self._classes) != texts:
            kinds = ("texts", "integers") if texts else ("integers", "texts")
            raise DataError(
                f"{parts[0][0]}: {self.label!r} has {kinds[0]}; expected {kinds[1]}, as in the "
                "training rows"
            )
        if not texts:
            self._classes = []
            return np.concatenate([labels for _, labels in parts])
        if not self._classes:
            self._classes = sorted(set().union(*(labels.tolist() for _, labels in parts)))
        numbers = {name: number for number, name in enumerate(self._classes)}
        for file, labels in parts:
            for row, name in enumerate(labels.tolist()):
                if name not in numbers:
                    raise DataError(
                        f"{file}: row {row + 1}: {self.label!r} is {name!r}, no class of the training "
                        f"rows; {nearest(name, self._classes)}"
                    )
        return np.array(
            [numbers[name] for _, labels in parts for name in labels.tolist()], np.int32
        )


def _numbers(file: Path, name: str, column: Any, start: int, check: bool) -> np.ndarray:
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
    if check:
        _refuse_missing(file, name, column, start)
    values = np.asarray(column.to_numpy())
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    bad = ~np.isfinite(narrow)
    if check and bad.any():
        row = int(bad.argmax())
        raise DataError(
            f"{file}: row {start + row + 1}: {name!r} is {values[row]}; expected a finite number of float32"
        )
    return narrow


def _labels(file: Path, name: str, column: Any) -> np.ndarray:
    """Return a column as int64 or as Python texts."""
    import pyarrow
    import pyarrow.types as of

    _refuse_missing(file, name, column)
    views = [pyarrow.string_view()] if hasattr(pyarrow, "string_view") else []  # since version 16
    texts_of = [pyarrow.string(), pyarrow.large_string(), *views]
    if of.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if of.is_integer(column.type) or of.is_boolean(column.type):
        numbers = np.asarray(column.to_numpy())
        bad = (numbers < 0) | (numbers >= 2**31)
        if bad.any():
            row = int(bad.argmax())
            raise DataError(
                f"{file}: row {row + 1}: {name!r} is {numbers[row]}; expected an integer from 0"
            )
        return numbers.astype(np.int64)
    if column.type in texts_of:
        texts = np.array(column.to_pylist(), dtype=object)
        if "" in texts:
            row = texts.tolist().index("")
            raise DataError(f"{file}: row {row + 1} has no {name!r}; expected a value in each row")
        return texts
    raise DataError(f"{file}: {name!r} is {column.type}; expected integers or texts as labels")


def _refuse_missing(file: Path, name: str, column: Any, start: int = 0) -> None:
    if column.null_count:
        row = int(np.asarray(column.is_null().to_numpy()).argmax())
        raise DataError(
            f"{file}: row {start + row + 1} has no {name!r}; expected a value in each row"
        )
