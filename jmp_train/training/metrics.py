"""The records of a run: strict JSON lines, and TensorBoard events beside them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def strict_json(value: Any) -> Any:
    """A value that standard JSON can hold: arrays to numbers and lists, a NaN to "nan".

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
    """Writes strict JSON, all of it or nothing: a reader never sees half a file."""
    text = json.dumps(strict_json(value), indent=2, allow_nan=False) + "\n"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; a torn last line is left out.

    Raises:
      ValueError: for a line before the last that is not a record, by its number.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: expected a record, got {line[:40]!r}")
        records.append(record)
    return records


class MetricsWriter:
    """Appends records to metrics.jsonl and to TensorBoard's events.

    Args:
      run_dir: holds metrics.jsonl and tensorboard/.
      resume_step: where a run goes on; records of later steps are dropped, because they will be
        written again.
    """

    def __init__(self, run_dir: Path, *, resume_step: int = 0):
        import tensorboardX

        path = run_dir / "metrics.jsonl"
        kept = []
        if resume_step and path.exists():
            kept = [r for r in read_metrics(path) if r["step"] <= resume_step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        os.replace(partial, path)
        self._lines = path.open("a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None
        )

    def write(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Writes one record.

        Args:
          step: steps taken.
          split: "train" or "eval".
          values: numbers by name, or lists of words, which TensorBoard does not get.
        """
        values = {k: v for k, v in values.items() if k not in ("step", "split")}
        record = strict_json({"step": step, "split": split, **values})
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if not isinstance(value, list) and math.isfinite(value):
                self._events.add_scalar(f"{split}/{name}", float(value), step)

    def close(self) -> None:
        """Flushes and closes both."""
        self._lines.close()
        self._events.close()
