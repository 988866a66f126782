"""The first predictions as a table."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table

_SHOWN = 6  # numbers of a row


def predictions_table(
    predictions: dict[str, np.ndarray], files: list[str] | None, rows: int = 10
) -> Table:
    """Return the first predictions as a table, one row per example.

    The probabilities beside a class are shown as that of the class. Labels are shown by number, and texts as they are.

    Args:
      predictions: arrays by name, one row per example.
      files: the file of each example, in place of its number; None for none.
      rows: number of examples to show at most.
    """
    columns = {
        name: _column(name, array[:rows], predictions) for name, array in predictions.items()
    }
    table = Table(box=None, header_style="bold")
    table.add_column("example" if files is None else "file", justify="left", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right")
    count = min(rows, len(next(iter(predictions.values()))))
    for i in range(count):
        head = str(i) if files is None else files[i]
        table.add_row(_escaped(head), *(column[i] for column in columns.values()))
    return table


def _column(name: str, array: np.ndarray, predictions: dict[str, np.ndarray]) -> list[str]:
    classes = predictions.get("class")
    if name == "probability" and classes is not None and array.ndim == 2:
        return [f"{row[c]:.4f}" for row, c in zip(array, classes, strict=False)]
    return [_cell(row) for row in array]


def _cell(row: Any) -> str:
    row = np.asarray(row)
    if row.ndim == 0:
        return _number(row)
    if row.dtype == np.bool_ and row.ndim == 1:
        return ", ".join(map(str, np.flatnonzero(row))) or "none"
    flat = row.ravel()
    more = f" ... ({flat.size} numbers)" if flat.size > _SHOWN else ""
    return " ".join(map(_number, flat[:_SHOWN])) + more


def _number(x: Any) -> str:
    kind = x.dtype.kind
    if kind == "U":
        return _escaped(x.item())
    return str(x.item()) if kind in "iub" else f"{float(x):.4g}"


def _escaped(name: str) -> str:
    """Return a name without characters that act on the terminal, or that Rich reads as markup."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    return text.replace("[", r"\[")
