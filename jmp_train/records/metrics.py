"""Strict JSON: files written whole, and the lines of a metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from jmp_train.types import Json


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
    replace_text(path, json.dumps(strict_json(value), indent=2, allow_nan=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a text file, all of it or nothing."""
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
