"""Families: files whose experiments differ in precision only."""

from __future__ import annotations

import ast
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.settings import with_settings

#: Settings of the precisions of every family, by the suffix of the experiment's name. A family file
#: adds or replaces precisions with its own `PRECISIONS`; the value None removes one.
PRECISIONS: Mapping[str, Mapping[str, Any]] = {
    "fp32": {"policy": "float32"},
    "fp16": {"policy": "mixed_float16"},
    "bf16": {"policy": "mixed_bfloat16"},
}


def names_in(path: Path) -> list[str]:
    """Return the names of the experiments in a file; the file is parsed, not executed.

    A file that sets `EXPERIMENT` defines one experiment with the name of the file. A file that sets
    `FAMILY` defines an experiment for each of `PRECISIONS`. Other files, such as modules that the
    experiments import, define none.

    Raises:
      OSError: if the file cannot be read.
    """
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # A broken experiment is listed, so that running it reports the error.
        return [path.stem] if re.search(r"^(EXPERIMENT|FAMILY)\b.*=", text, re.MULTILINE) else []
    values = dict(_assignments(tree))
    if "EXPERIMENT" in values:
        return [path.stem]
    if "FAMILY" not in values:
        return []
    return [f"{path.stem}_{suffix}" for suffix in _suffixes(values.get("PRECISIONS"))]


def member(family: AnyExperiment, precisions: Any, suffix: str) -> AnyExperiment:
    """Return the experiment of a family in one precision.

    Args:
      family: settings that the experiments share.
      precisions: the family's `PRECISIONS`: for each suffix, settings by dotted path.
      suffix: name of the experiment without the name of the family and `_`.

    Raises:
      ValueError: for a table that is not a dict of such settings, an unknown setting, or an invalid
        value.
    """
    if not isinstance(precisions, Mapping):
        line = f"it is {reprlib.repr(precisions)}; expected a dict literal"
        raise ValueError(line)  # noqa: TRY004  (a value in a file, like any other)
    settings = {**PRECISIONS, **precisions}.get(suffix)
    if not isinstance(settings, Mapping):
        line = (
            f"{suffix!r} is {reprlib.repr(settings)}; expected a dict of settings by dotted path, such "
            "as {'policy': 'bf16'}"
        )
        raise ValueError(line)  # noqa: TRY004
    return with_settings(family, settings)


def _assignments(tree: ast.Module) -> list[tuple[str, ast.expr | None]]:
    found = []
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names = (n for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name))
            found += [(name.id, node.value) for name in names]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append((node.target.id, node.value))
    return found


def _suffixes(table: ast.expr | None) -> list[str]:
    """Return the suffixes of a family from the syntax tree of its `PRECISIONS`."""
    suffixes = dict.fromkeys(PRECISIONS, True)
    if isinstance(table, ast.Dict):
        for key, value in zip(table.keys, table.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                removed = isinstance(value, ast.Constant) and value.value is None
                suffixes[key.value] = not removed
    return [suffix for suffix, present in suffixes.items() if present]
