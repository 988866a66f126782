"""metrics.jsonl: one strict JSON object a line; the record that resuming and plots rely on."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from jmp_train.records.metrics import read_metrics, replace_text, strict_json
from jmp_train.types import Json

log = logging.getLogger(__name__)


class Jsonl:
    """Appends records to metrics.jsonl, as `Tracker`; records of later steps are dropped at a start,
    because they will be written again."""

    def start(self, config: Json) -> None:
        """Open the file.

        Raises:
          ValueError: if a record there is damaged.
          OSError: if it cannot be written.
        """
        run = config["run"]
        path = Path(run["directory"]) / "metrics.jsonl"
        kept = []
        if run["step"] and path.exists():
            kept = [r for r in read_metrics(path) if r["step"] <= run["step"]]
        replace_text(path, "".join(json.dumps(r) + "\n" for r in kept))
        self._lines = path.open("ab", buffering=0)
        self._pending = b""  # lines that the disk has not taken yet

    def record(self, step: int, split: str, values: Json) -> None:
        """Write one record. On a full disk there is a warning, and the record waits for room."""
        record = strict_json({"step": step, "split": split, **values})
        waiting = bool(self._pending)
        self._pending += json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            self.flush()
        except OSError as error:
            if not waiting:
                log.warning("metrics.jsonl cannot be written, and waits: %s", error.strerror)

    def flush(self) -> None:
        """Write the waiting records.

        Raises:
          OSError: if they still cannot be written.
        """
        while self._pending:  # a disk with a little room takes a part
            self._pending = self._pending[self._lines.write(self._pending) or 0 :]

    def finish(self, summary: Json) -> None:
        """Flush and close the file, as far as the disk takes it."""
        del summary  # summary.json has it
        try:
            self.flush()
        except OSError as error:
            log.warning("metrics.jsonl lacks its last records: %s", error.strerror)
        self._lines.close()
