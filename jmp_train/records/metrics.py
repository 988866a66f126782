"""The records of a run: strict JSON lines, and TensorBoard events beside them."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from jmp_train.types import Json

log = logging.getLogger(__name__)

_EVENTS_FLUSHED_EVERY = 10.0  # seconds; it waits for the disk


def strict_json(value: Any) -> Any:
    """Return a value as standard JSON can hold it: arrays as numbers and lists, a NaN as "nan".

    >>> import numpy as np
    >>> strict_json({"loss": np.float32("nan"), "n": np.int32(3), "x": (1.5, float("-inf"))})
    {'loss': 'nan', 'n': 3, 'x': [1.5, '-inf']}
    """
    if isinstance(value, dict):
        return {str(k): strict_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return strict_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON, all of it or nothing: a reader never sees half a file."""
    _replace(path, json.dumps(strict_json(value), indent=2, allow_nan=False) + "\n")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_metrics(path: Path) -> list[Json]:
    """Return the records of a metrics.jsonl in order; a torn last line is left out.

    Raises:
      ValueError: for a line before the last that is not a record, by its number.
    """
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: expected a record, got {_start(line)}")
        records.append(record)
    return records


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not strict JSON")


def _start(line: bytes) -> str:
    return repr(line[:40].decode("utf-8", errors="replace"))


class MetricsWriter:
    """Appends records to metrics.jsonl and to TensorBoard's events.

    Args:
      run_dir: the directory of metrics.jsonl and tensorboard/.
      resume_step: the step that a run resumes from; records of later steps are dropped, because
        they will be written again.

    Raises:
      ValueError: if a record there is damaged.
      OSError: if metrics.jsonl cannot be written.
    """

    def __init__(self, run_dir: Path, *, resume_step: int = 0):
        path = run_dir / "metrics.jsonl"
        kept = []
        if resume_step and path.exists():
            kept = [r for r in read_metrics(path) if r["step"] <= resume_step]
        _replace(path, "".join(json.dumps(r) + "\n" for r in kept))
        self._lines = path.open("ab", buffering=0)
        self._pending = b""  # lines that the disk has not taken yet
        self._events: _Events | None = None
        try:
            self._events = _Events(run_dir / "tensorboard", resume_step)
        except OSError as error:
            self._end_events(error)

    def write(self, step: int, split: str, values: Json) -> None:
        """Write one record. On a full disk there is a warning, and the record waits for room.

        Args:
          step: steps taken.
          split: "train" or "eval".
          values: numbers by name, or lists of names, which TensorBoard does not get.
        """
        values = {k: v for k, v in values.items() if k not in ("step", "split")}
        record = strict_json({"step": step, "split": split, **values})
        waiting = bool(self._pending)
        self._pending += json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            self._write_pending()
        except OSError as error:
            if not waiting:
                log.warning("metrics.jsonl cannot be written, and waits: %s", error.strerror)
        if self._events is not None:
            try:
                self._events.write(step, split, values)
            except OSError as error:
                self._end_events(error)

    def flush(self) -> None:
        """Write the waiting records.

        Raises:
          OSError: if metrics.jsonl still cannot be written.
        """
        self._write_pending()
        if self._events is not None:
            try:
                self._events.flush()
            except OSError as error:
                self._end_events(error)

    def close(self) -> None:
        """Flush and close both files, as far as the disk takes them."""
        try:
            self.flush()
        except OSError as error:
            log.warning("metrics.jsonl lacks its last records: %s", error.strerror)
        self._lines.close()
        if self._events is not None:
            try:
                self._events.close()
            except OSError as error:
                self._end_events(error)

    def _write_pending(self) -> None:
        while self._pending:  # a disk with a little room takes a part
            self._pending = self._pending[self._lines.write(self._pending) or 0 :]

    def _end_events(self, error: OSError) -> None:
        log.warning("TensorBoard's events end here: %s", error.strerror)
        self._events = None


class _Events:
    """TensorBoard's events, written without a thread: tensorboardX's own SummaryWriter has one, and
    hangs for ever when that thread has died of a full disk."""

    def __init__(self, directory: Path, resume_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        messages: Any = event_pb2  # protobuf makes its classes on import

        directory.mkdir(exist_ok=True)
        self._event, self._scalar = messages.Event, scalar
        self._writer = EventsWriter(str(directory / "events"), f".{resume_step}")
        if resume_step:  # TensorBoard drops what it has from this step on
            for what in (
                {"file_version": "brain.Event:2"},
                {"session_log": messages.SessionLog(status=messages.SessionLog.START)},
            ):
                self._writer.write_event(self._event(step=resume_step + 1, **what))
        self._flushed = 0.0

    def write(self, step: int, split: str, values: Json) -> None:
        for name, value in values.items():
            if not isinstance(value, list) and math.isfinite(value):
                summary = self._scalar(f"{split}/{name}", float(value))
                event = self._event(wall_time=time.time(), step=step, summary=summary)
                self._writer.write_event(event)
        if time.monotonic() - self._flushed > _EVENTS_FLUSHED_EVERY:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()
