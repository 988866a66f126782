"""All trackers of a run behind one: metrics.jsonl, which must be written, and the others."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any

from jmp_train.records.trackers.jsonl import Jsonl
from jmp_train.records.trackers.tracker import Tracker
from jmp_train.types import Json

log = logging.getLogger(__name__)


class Trackers:
    """Passes records to metrics.jsonl and to other trackers, whose failures are warnings.

    Args:
      others: pairs of a name for warnings and a tracker.
      silent: whether nothing is passed on, because another process of the run does it.
    """

    def __init__(self, others: Iterable[tuple[str, Tracker]] = (), *, silent: bool = False):
        self._jsonl, self._silent = Jsonl(), silent
        self._others = list(others)

    def start(self, config: Json) -> None:
        """Start every tracker, as `Tracker.start`.

        Raises:
          ValueError: if a record in metrics.jsonl is damaged.
          OSError: if metrics.jsonl cannot be written.
        """
        if not self._silent:
            self._jsonl.start(config)
        self._call("start", config)

    def record(self, step: int, split: str, values: Json) -> None:
        """Pass a record on. On a full disk the record waits for room in metrics.jsonl."""
        values = {k: v for k, v in values.items() if k not in ("step", "split")}
        if not self._silent:
            self._jsonl.record(step, split, values)
        self._call("record", step, split, values)

    def flush(self) -> None:
        """Write the waiting records.

        Raises:
          OSError: if metrics.jsonl still cannot be written.
        """
        if not self._silent:
            self._jsonl.flush()
        self._call("flush")

    def finish(self, summary: Json) -> None:
        """End every tracker, as `Tracker.finish`."""
        if not self._silent:
            self._jsonl.finish(summary)
        self._call("finish", summary)

    def _call(self, method: str, *arguments: Any) -> None:
        working = []
        for name, tracker in self._others:
            try:
                if method != "flush" or hasattr(tracker, "flush"):
                    getattr(tracker, method)(*copy.deepcopy(arguments))
                working.append((name, tracker))
            # A client may raise anything, and some end the process.
            except (Exception, SystemExit) as error:  # noqa: BLE001
                what = (str(error).strip() or "no message").splitlines()[0]
                kind = type(error).__name__
                log.warning("tracker %s ends here: %s in %s: %s", name, kind, method, what)
        self._others = working
