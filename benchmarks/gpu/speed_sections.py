"""Tables of training speed on a GPU: one for a workload, the ceilings, the goals, the README's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.goals import GOALS, GPTS, NOT_YET, loss_remark
from benchmarks.gpu.results import PRECISIONS, PROGRAMS, Result, Row
from benchmarks.gpu.table import ROWS
from benchmarks.gpu.tables import gib, number, origin, table, times

_COLUMNS = (
    *("precision", "program", "{unit} a second", "step ms, median [q1, q3]", "speed-up"),
    *("MFU, datasheet", "MFU, measured ceiling", "peak memory", "of fp32's", "compile s"),
    *("loss after 100 steps", "skipped", "SM clock MHz", "power W"),
)


def workload_section(results: Sequence[Result], workload: str, unit: str) -> str:
    """Return a workload's heading and, for each device, a sentence, a table and its origin."""
    parts = [f"### {workload}"]
    for result in results:
        parts += [
            speed_sentence(result, workload),
            speed_table(result, workload, unit),
            origin(result.data),
        ]
    if not results:
        empty = [NOT_YET, *[""] * (len(_COLUMNS) - 1)]
        parts += ["Not measured yet.", table(_header(unit), [empty], text=(0, 1))]
        parts += ["`make bench-gpu`, on a GPU."]
    return "\n\n".join(parts)


def speed_table(result: Result, workload: str, unit: str) -> str:
    """Return a row for each precision and program that was measured, or is planned to be."""
    planned = [r.id for r in ROWS if r.workload == workload and not r.question]
    found = [
        key
        for key, data in result.data["rows"].items()
        if data.get("workload") == workload and data.get("program") and not data.get("question")
    ]
    rows = [_cells(result, key) for key in sorted({*planned, *found}, key=_order)]
    return table(_header(unit), rows, text=(0, 1))


def speed_sentence(result: Result, workload: str) -> str:
    """Return what jmp_train's rows of a workload say, in a sentence."""
    says = []
    for precision in ("bf16", "fp16", "tf32"):
        row = result.row(workload, precision)
        if row is not None and row.speed_up is not None:
            mark = "" if row.counts else " (does not count: " + loss_remark(row) + ")"
            says.append(f"{precision} {times(row.speed_up)} times{mark}")
    base = result.row(workload, "fp32")
    if base is None:
        return (
            f"On {result.device}: strict fp32 is not measured yet, so there is no speed-up to give."
        )
    rate = f"strict fp32 handles {number(base.rate)} {base.data['unit']} a second"
    return f"On {result.device}, {rate}{'; ' + ', '.join(says) + ' that' if says else ''}."


def ceiling_section(results: Sequence[Result]) -> str:
    """Return the measured rates of matrix products and of copies."""
    header = ["", *PRECISIONS, "copy GB/s"]
    rows = [
        [result.device]
        + [number(result.ceiling(p)) or NOT_YET for p in PRECISIONS]
        + [number(result.copy_bandwidth()) or NOT_YET]
        for result in results
    ]
    rows = rows or [["", *[NOT_YET] * (len(header) - 1)]]
    return "\n\n".join(
        [
            "### The measured ceiling",
            "TFLOP/s of products of square matrices of 8,192 rows, which the second MFU divides by.",
            table(header, rows),
            *(origin(result.data) for result in results),
        ]
    )


def goals_section(results: Sequence[Result]) -> str:
    """Return, for each device, each goal with its worst figure and verdict."""
    blocks = []
    for result in results or [None]:
        verdicts = [goal.verdict(result) for goal in GOALS]
        reached = sum(says.startswith("reached") for _, says in verdicts)
        missed = sum("missed" in says for _, says in verdicts)
        rest = len(GOALS) - reached - missed
        device = "" if result is None else f"On {result.device}: "
        sentence = f"{device}{reached} of {len(GOALS)} reached, {missed} missed, {rest} open."
        rows = [
            [goal.text, worst, says] for goal, (worst, says) in zip(GOALS, verdicts, strict=True)
        ]
        header = ("goal", "figure furthest from it", "verdict")
        blocks += [sentence, table(header, rows, text=(0, 1, 2))]
        blocks.append("`make bench-gpu`, on a GPU." if result is None else origin(result.data))
        if result is not None and (missed or _profiles(result)):
            blocks.append(_profile_section(result))
    return "\n\n".join(blocks)


def _profiles(result: Result) -> dict[str, list[dict[str, Any]]]:
    return {key: row["profile"] for key, row in result.data["rows"].items() if row.get("profile")}


def _profile_section(result: Result) -> str:
    """Return where the time of the profiled rows' steps goes, by kind of operation."""
    profiles = _profiles(result)
    command = "`python -m benchmarks.gpu --profile ROW`"
    if not profiles:
        return f"Where a step's time goes is not measured yet: {command}."
    spent = {key: {k["kind"]: k for k in kinds} for key, kinds in profiles.items()}
    most = lambda kind: max(row[kind]["ms"] for row in spent.values() if kind in row)
    kinds = sorted({kind for row in spent.values() for kind in row}, key=most, reverse=True)
    rows = [
        [kind]
        + [
            f"{number(row[kind]['ms'])} ({100 * row[kind]['share']:.0f} %)" if kind in row else ""
            for row in spent.values()
        ]
        for kind in kinds
    ]
    header = ["ms a step (share)", *(f"`{key}`" for key in spent)]
    return "\n\n".join([f"Where a step's time goes, by {command}:", table(header, rows)])


def short_table(results: Sequence[Result], workload: str = GPTS[0]) -> str:
    """Return the README's table: jmp_train in each precision, on the device measured last."""
    header = (f"{workload}, precision", "tokens a second", "speed-up", "peak memory", "MFU")
    result = results[0] if results else None
    if result is None:
        rows = [[precision, NOT_YET, "", "", ""] for precision in PRECISIONS]
        return table(header, rows)
    rows = []
    for precision in PRECISIONS:
        row = result.row(workload, precision)
        if row is None:
            why = result.why_missing(f"{workload}/{precision}/jmp_train")
            rows.append([precision, why, "", "", ""])
            continue
        memory = gib(row.data.get("peak_memory_bytes"))
        share = f" ({times(row.memory_ratio)})" if row.memory_ratio is not None else ""
        rows.append(
            [precision, number(row.rate), _speed_up(row), memory + share, times(row.mfu_ceiling)]
        )
    return table(header, rows) + f"\n\nMeasured on {result.device}, {result.data['date']}."


def _header(unit: str) -> list[str]:
    return [name.format(unit=unit) for name in _COLUMNS]


def _order(key: str) -> tuple[Any, ...]:
    _, precision, program, *options = key.split("/")
    rank = lambda names, name: names.index(name) if name in names else len(names)
    return len(options), rank(PRECISIONS, precision), rank(PROGRAMS, program), options


def _cells(result: Result, key: str) -> list[str]:
    _, precision, program, *options = key.split("/")
    named = [precision, ", ".join([program, *(option.replace("=", " ") for option in options)])]
    row = result.derive(key)
    if row is None:
        return [*named, result.why_missing(key), *[""] * (len(_COLUMNS) - 3)]
    return [
        *named,
        number(row.rate),
        step_cell(row),
        _speed_up(row),
        times(row.data.get("mfu_datasheet")),
        times(row.mfu_ceiling),
        gib(row.data.get("peak_memory_bytes")),
        times(row.memory_ratio),
        number(row.data.get("compile_s")),
        loss_cell(row),
        number(row.data.get("skipped")),
        *(number(row.data.get("device", {}).get(name)) for name in ("sm_mhz", "power_w")),
    ]


def _speed_up(row: Row) -> str:
    """The ratio, struck through where the loss does not allow it to count."""
    return (
        times(row.speed_up) if row.counts or row.speed_up is None else f"~~{times(row.speed_up)}~~"
    )


def loss_cell(row: Row) -> str:
    """Return the loss after 100 steps, or after the step that it was compared at, and a mark."""
    losses = row.data.get("losses") or {"100": row.data.get("loss_100")}
    step = row.loss_step or max(map(int, losses))
    loss = losses.get(str(step))
    shown = "not finite" if loss is None else f"{loss:.3f}"
    shown += "" if step == 100 else f" after {step}"
    if row.loss_step is None:
        return f"{shown}, fp32's is not measured yet"
    return shown if row.counts else f"{shown}, **does not count**"


def step_cell(row: Row) -> str:
    """Return a step's milliseconds: median and quartiles."""
    step = row.data["step_ms"]
    return f"{number(step['median'])} [{number(step['q1'])}, {number(step['q3'])}]"
