"""Markdown of the report: cells, tables, and the line that says where figures come from."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

LONGEST_LIST = 8  # a longer list in a cell is a curve, not a figure


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, text: Container[int] = (0,)
) -> str:
    """Return a Markdown table; columns whose number is not in `text` are right-aligned."""
    rule = ["---" if i in text else "---:" for i in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: Any, digits: int = 3) -> str:
    """Return a cell: few significant digits, thousands separated, empty for None.

    >>> [number(x) for x in (12345.6, 0.98765, 3, None, float("nan"), 1.5e-5)]
    ['12,346', '0.988', '3', '', 'nan', '1.5e-05']
    """
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 10**digits:
        return (
            f"{value:.{digits}g}" if float(f"{value:.{digits}g}") < 10**digits else f"{value:,.0f}"
        )
    return f"{value:,.0f}" if abs(value) >= 1 else f"{value:.{digits}g}"


def gib(count: float | None) -> str:
    """Return bytes in GiB; in MiB below a tenth of one.

    >>> gib(3 * 2**30), gib(5 * 2**20)
    ('3.00 GiB', '5.00 MiB')
    """
    if count is None:
        return ""
    unit, size = ("GiB", 2**30) if count >= 0.1 * 2**30 else ("MiB", 2**20)
    return f"{count / size:.2f} {unit}"


def times(value: float | None) -> str:
    """Return a ratio with two decimals, empty for None."""
    return "" if value is None else f"{value:.2f}"


def origin(data: Mapping[str, Any]) -> str:
    """Return the line under a table: command, device, driver, versions and date."""
    device = data["device"]
    limits = {k: v for k, v in device.get("clocks_mhz", {}).items() if k.endswith("_max")}
    clocks = ", ".join(f"{name} {mhz} MHz" for name, mhz in limits.items())
    parts = [
        f"`{data['command']}`",
        device["kind"],
        f"driver {device['driver']}" if device.get("driver") else "",
        f"power limit {number(device['power_limit_w'])} W" if device.get("power_limit_w") else "",
        f"clocks: {clocks}" if clocks else "",
        ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version),
        str(data["date"]),
    ]
    return "; ".join(part for part in parts if part) + "."


def rows_tables(rows: Any) -> list[str]:
    """Return the tables of a benchmark's `rows`: a list of rows, rows by name, or such lists by name.

    Nested values become columns (`equivalence low`), a mean with its deviation one cell, a short
    list its values; a longer list, a curve or a histogram, is left to the plots.
    """
    if isinstance(rows, list):
        return [_table_of(rows)]
    if all(isinstance(row, dict) for row in rows.values()):
        return [_table_of([{"": name, **row} for name, row in rows.items()])]
    return [table for part in rows.values() if _is_rows(part) for table in rows_tables(part)]


def settings_line(data: Mapping[str, Any]) -> str:
    """Return sizes and counts of a benchmark in one line; empty where it has none."""
    settings = {name: x for name, x in data.get("settings", {}).items() if x is not None}
    cells = (f"{words(name)} {_cell(x)}" for name, x in settings.items())
    return "Settings: " + ", ".join(cells) + "." if settings else ""


def words(name: str) -> str:
    """Return a field's name in words.

    >>> words("ms_per_step"), words("mfu_ceiling")
    ('ms per step', 'MFU ceiling')
    """
    capitals = {"mib": "MiB", "mfu": "MFU", "gib": "GiB"}
    return " ".join(capitals.get(word, word) for word in name.split("_"))


def read_json(path: Path) -> dict[str, Any]:
    """Return a result file."""
    return json.loads(path.read_text())


def _is_rows(part: Any) -> bool:
    return isinstance(part, dict) or (
        isinstance(part, list) and bool(part) and all(isinstance(row, dict) for row in part)
    )


def _table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    flat = [_flat(row) for row in rows]
    names = dict.fromkeys(name for row in flat for name in row)
    columns = [name for name in names if any(row.get(name) not in ("", None) for row in flat)]
    text = [
        i for i, name in enumerate(columns) if any(isinstance(row.get(name), str) for row in flat)
    ]
    cells = [[_escape(_cell(row.get(name))) for name in columns] for row in flat]
    return table([name.removesuffix(" bytes") for name in columns], cells, text=text)


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, list) and len(value) > LONGEST_LIST:
            continue
        if isinstance(value, dict) and "mean" not in value:
            flat |= _flat(value, f"{prefix}{name} ")
        elif name.endswith("_bytes") and isinstance(value, (int, float)):
            flat[prefix + words(name)] = gib(value)
        else:
            flat[prefix + words(name)] = value
    return flat


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict) and "mean" in value:
        return f"{number(value['mean'], 4)} ± {number(value.get('std'), 2)}"
    if isinstance(value, dict):
        return ", ".join(f"{words(name)} {_cell(x)}" for name, x in value.items())
    if isinstance(value, list):
        return ", ".join(dict.fromkeys(_cell(x) for x in value))
    return number(value) if isinstance(value, (int, float)) else str(value or "")


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
