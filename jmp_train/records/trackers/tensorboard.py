"""TensorBoard's events, under tensorboard/ in the run's directory."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from jmp_train.records.trackers.tracker import numbers
from jmp_train.types import Json

_FLUSHED_EVERY = 10.0  # seconds; it waits for the disk


class TensorBoard:
    """Writes events without a thread, as `Tracker`: tensorboardX's own SummaryWriter has one, and
    hangs for ever when that thread has died of a full disk."""

    def start(self, config: Json) -> None:
        """Open a new file of events."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        messages: Any = event_pb2  # protobuf makes its classes on import

        step = config["run"]["step"]
        directory = Path(config["run"]["directory"]) / "tensorboard"
        directory.mkdir(exist_ok=True)
        self._event, self._scalar = messages.Event, scalar
        self._writer = EventsWriter(str(directory / "events"), f".{step}")
        if step:  # TensorBoard drops what it has from this step on
            for what in (
                {"file_version": "brain.Event:2"},
                {"session_log": messages.SessionLog(status=messages.SessionLog.START)},
            ):
                self._writer.write_event(self._event(step=step + 1, **what))
        self._flushed = 0.0

    def record(self, step: int, split: str, values: Json) -> None:
        """Write the finite numbers of a record."""
        for name, value in numbers(split, values).items():
            if math.isfinite(value):
                summary = self._scalar(name, value)
                event = self._event(wall_time=time.time(), step=step, summary=summary)
                self._writer.write_event(event)
        if time.monotonic() - self._flushed > _FLUSHED_EVERY:
            self.flush()

    def flush(self) -> None:
        """Write the events that wait in memory."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def finish(self, summary: Json) -> None:
        """Close the file."""
        del summary
        self._writer.close()
