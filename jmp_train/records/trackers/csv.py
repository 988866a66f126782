"""metrics.csv in the run's directory: a row for each record, a column for each name."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from jmp_train.records.metrics import replace_text, strict_json
from jmp_train.types import Json


class Csv:
    """Appends rows to metrics.csv, as `Tracker`.

    Every record is one row; a value that it does not have is empty. A name that was not there before
    becomes a new last column. A start drops the rows of later steps and a torn last row.
    """

    def start(self, config: Json) -> None:
        """Open the file."""
        run = config["run"]
        self._path = Path(run["directory"]) / "metrics.csv"
        self._columns, rows = ["step", "split"], []
        if run["step"] and self._path.exists():
            columns, rows = self._read()
            self._columns = columns or self._columns
        self._rewrite([row for row in rows if int(row[0]) <= run["step"]])

    def record(self, step: int, split: str, values: Json) -> None:
        """Append one row; its lists are written as JSON."""
        record = {"step": step, "split": split, **strict_json(values)}
        new = [name for name in record if name not in self._columns]
        if new:
            _, rows = self._read()
            self._columns += new
            self._rewrite(rows)
        row = [record.get(name, "") for name in self._columns]
        text = _line([json.dumps(cell) if isinstance(cell, list) else cell for cell in row])
        with self._path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)

    def finish(self, summary: Json) -> None:
        """Do nothing: every row is on its way to the disk."""

    def _read(self) -> tuple[list[str], list[list[str]]]:
        """Return the columns and the whole rows."""
        text = self._path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        columns, *rows = csv.reader(io.StringIO(whole)) if whole else ([],)
        return columns, rows

    def _rewrite(self, rows: list[list[str]]) -> None:
        width = len(self._columns)
        padded = [row + [""] * (width - len(row)) for row in rows]
        replace_text(self._path, "".join(map(_line, [self._columns, *padded])))


def _line(cells: list) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
