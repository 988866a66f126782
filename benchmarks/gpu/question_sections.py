"""Questions of the GPU benchmark whose rows differ in one option, with an answer each."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu.goals import NOT_YET
from benchmarks.gpu.questions import verdict
from benchmarks.gpu.results import Result, Row
from benchmarks.gpu.speed_sections import loss_cell, step_cell
from benchmarks.gpu.table import ROWS
from benchmarks.gpu.tables import gib, number, origin, table, times

TITLES = {
    "loss_scale": "What does the loss scale cost in fp16?",
    "naming": "What does it cost to name the leaf of a skipped step's non-finite gradient?",
    "remat": "What do remat none, dots and full cost and save?",
    "attention": "Is cuDNN's attention faster than XLA's?",
    "accumulation": "Does accumulating gradients in bfloat16 pay?",
    "xla_flags": "Which XLA flags are worth setting?",
}
_COLUMNS = (
    *("row", "step ms, median [q1, q3]", "{unit} a second", "of the first", "peak memory"),
    *("compile s", "loss after 100 steps", "skipped"),
)


def questions_section(results: Sequence[Result]) -> str:
    """Return a section for each question, those of `TITLES` first."""
    asked = dict.fromkeys([*TITLES, *(row.question for row in ROWS if row.question)])
    parts = []
    for question in asked:
        parts.append(f"## {TITLES.get(question, question.replace('_', ' '))}")
        for result in results:
            parts += [_answer(question, result), _table(question, result), origin(result.data)]
        if not results:
            rows = [[f"`{key}`", NOT_YET, *[""] * (len(_COLUMNS) - 2)] for key in _keys(question)]
            parts += ["Not measured yet.", table(_header("tokens"), rows)]
            parts += ["`make bench-gpu PART=2`, on a GPU."]
    return "\n\n".join(parts)


def _keys(question: str, result: Result | None = None) -> list[str]:
    """Return the identifiers of a question's rows, planned and measured."""
    planned = [row.id for row in ROWS if row.question == question]
    rows = {} if result is None else result.data["rows"]
    found = [key for key, data in rows.items() if data.get("question") == question]
    return list(dict.fromkeys([*planned, *found]))


def _answer(question: str, result: Result) -> str:
    says = verdict(question, result.data["rows"])
    return f"On {result.device}: {says.removesuffix('.')}."


def _header(unit: str) -> list[str]:
    return [name.format(unit=unit) for name in _COLUMNS]


def _table(question: str, result: Result) -> str:
    keys = _keys(question, result)
    first = next((row for key in keys if (row := result.derive(key))), None)
    unit = first.data["unit"] if first else "tokens"
    return table(_header(unit), [_cells(key, result, first) for key in keys])


def _cells(key: str, result: Result, first: Row | None) -> list[str]:
    row = result.derive(key)
    if row is None or first is None:
        return [f"`{key}`", result.why_missing(key), *[""] * (len(_COLUMNS) - 2)]
    return [
        f"`{key}`",
        step_cell(row),
        number(row.rate),
        times(row.rate / first.rate),
        gib(row.data.get("peak_memory_bytes")),
        number(row.data.get("compile_s")),
        loss_cell(row),
        number(row.data.get("skipped")),
    ]
