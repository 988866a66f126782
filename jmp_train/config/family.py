"""A family: one file of experiments that differ in their precision."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jmp_train.config.experiment import Experiment
from jmp_train.config.settings import with_settings

#: What the precisions of every family set, by the suffix of the experiment's name. A family adds
#: precisions, or replaces these, by a `PRECISIONS` of its own; None takes one away.
PRECISIONS: Mapping[str, Mapping[str, Any]] = {
    "fp32": {"policy": "float32"},
    "fp16": {"policy": "mixed_float16"},
    "bf16": {"policy": "mixed_bfloat16"},
}


def names_in(path: Path) -> list[str]:
    """Return the names of the experiments in a file; the file is parsed, not run.

    A file that sets `EXPERIMENT` is one experiment of its own name. One that sets `FAMILY` has an
    experiment for each of `PRECISIONS`. Any other has none, such as one that others import.

    Raises:
      OSError: for a file that cannot be read.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # One that means to be an experiment is listed, so that running it says what is wrong.
        return [path.stem] if re.search(r"^(EXPERIMENT|FAMILY)\b.*=", text, re.MULTILINE) else []
    values = dict(_assignments(tree))
    if "EXPERIMENT" in values:
        return [path.stem]
    if "FAMILY" not in values:
        return []
    return [f"{path.stem}_{suffix}" for suffix in _suffixes(values.get("PRECISIONS"))]


def member(family: Experiment[Any, Any], own: Any, suffix: str) -> Experiment[Any, Any]:
    """Return a family's experiment in one precision.

    Args:
      family: what its experiments share.
      own: the family's `PRECISIONS`: settings by dotted path, by suffix.
      suffix: one of the names that `names_in` found, without the family's.

    Raises:
      ValueError: for a setting that the experiment does not have or refuses.
    """
    return with_settings(family, {**PRECISIONS, **own}[suffix])


def _assignments(tree: ast.Module) -> list[tuple[str, ast.expr | None]]:
    found = []
    for node in tree.body:
        if isinstance(node, ast.Assign):
            found += [(t.id, node.value) for t in node.targets if isinstance(t, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append((node.target.id, node.value))
    return found


def _suffixes(own: ast.expr | None) -> list[str]:
    """The suffixes of a family, from the text of its own table."""
    suffixes = dict.fromkeys(PRECISIONS, True)
    if isinstance(own, ast.Dict):
        for key, value in zip(own.keys, own.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                kept = not (isinstance(value, ast.Constant) and value.value is None)
                suffixes[key.value] = kept
    return [suffix for suffix, kept in suffixes.items() if kept]
