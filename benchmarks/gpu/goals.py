"""Goals of the GPU benchmark, and what a result file says of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.gpu.results import LOSS_BOUND, Result, Row
from benchmarks.gpu.table import ROWS, workload

GPTS = ("gpt_124m", "gpt_1b3")
NOT_YET = "not measured yet"


class Finding(NamedTuple):
    """One figure that a goal is about."""

    where: str
    value: float | None
    """None where a row that it needs was not measured, or does not count."""
    uncounted: str = ""
    """Which row's loss keeps the figure from counting."""


class Goal(NamedTuple):
    """A bound for one or several figures; it is reached when all of them are known and meet it."""

    text: str
    bound: float
    at_least: bool
    find: Callable[[Result], list[Finding]]

    def verdict(self, result: Result | None) -> tuple[str, str]:
        """Return the figure that is furthest from the bound, and the verdict on all of them."""
        found = [] if result is None else self.find(result)
        values = [f for f in found if f.value is not None]
        uncounted = [f"{f.where}: not counted, {f.uncounted}" for f in found if f.uncounted]
        missing = [f.where for f in found if f.value is None and not f.uncounted]
        if not values:
            return "", "; ".join(uncounted) or NOT_YET
        worst = (min if self.at_least else max)(values, key=lambda f: f.value or 0.0)
        value = worst.value or 0.0
        short = self.bound - value if self.at_least else value - self.bound
        met = "so far met" if uncounted or missing else "reached"
        says = met if short <= 0 else f"**missed** by {100 * short / self.bound:.1f} %"
        says = "; ".join(
            [says, *uncounted, *([f"{NOT_YET}: {', '.join(missing)}"] if missing else [])]
        )
        return f"{value:.3f} ({worst.where})", says

    def missed(self, result: Result) -> bool:
        """Return whether a figure that counts does not meet the bound."""
        return "missed" in self.verdict(result)[1]


def _over(precision: str, other: str) -> Callable[[Result], list[Finding]]:
    """Return the rates of jmp_train in one precision over another, for each language model."""
    return lambda result: [
        _ratio(name, result.row(name, precision), result.row(name, other)) for name in GPTS
    ]


def _over_program(program: str, kinds: Sequence[str]) -> Callable[[Result], list[Finding]]:
    """Return the rates of jmp_train over those of another program, in each row planned for it."""
    planned = [
        row
        for row in ROWS
        if row.program == program and workload(row.workload, False).kind in kinds
    ]
    return lambda result: [
        _ratio(
            " ".join([row.workload, row.precision, *map("=".join, row.options)]),
            result.row(row.workload, row.precision, **dict(row.options)),
            result.row(row.workload, row.precision, program, **dict(row.options)),
        )
        for row in planned
    ]


def _memory(result: Result) -> list[Finding]:
    rows = {(w, p): result.row(w, p) for w in GPTS for p in ("fp16", "bf16")}
    return [_own(f"{w} {p}", row, row and row.memory_ratio) for (w, p), row in rows.items()]


def _utilisation(result: Result) -> list[Finding]:
    row = result.row("gpt_1b3", "bf16")
    return [_own("gpt_1b3 bf16", row, row and row.mfu_ceiling)]


def _ratio(where: str, row: Row | None, other: Row | None) -> Finding:
    if row is None or other is None:
        return Finding(where, None)
    return _if_counted(where, row.rate / other.rate, row, other)


def _own(where: str, row: Row | None, value: float | None) -> Finding:
    return Finding(where, None) if row is None else _if_counted(where, value, row)


def _if_counted(where: str, value: float | None, *rows: Row) -> Finding:
    """Return the figure if the losses of its rows allow it to count."""
    if any(row.loss_step is None for row in rows):
        return Finding(f"{where} (fp32's loss)", None)
    wrong = next((row for row in rows if not row.counts), None)
    if wrong is not None:
        return Finding(where, None, f"{wrong.id}: {loss_remark(wrong)}")
    return Finding(where, value)


def loss_remark(row: Row) -> str:
    """Return how far a row's loss is from fp32's, in a few words."""
    if row.loss_difference is None:
        return "no loss to compare with fp32's"
    return (
        f"loss after {row.loss_step} steps {row.loss_difference:+.3f} nats from fp32's "
        f"(bound {LOSS_BOUND})"
    )


GOALS = (
    Goal("bf16 at least 2.5 times strict fp32", 2.5, True, _over("bf16", "fp32")),
    Goal("fp16 at least 2.0 times strict fp32", 2.0, True, _over("fp16", "fp32")),
    Goal("bf16 at least 1.6 times TF32", 1.6, True, _over("bf16", "tf32")),
    Goal(
        "never below the hand-written JAX step by more than 2 % (ratio at least 0.98)",
        0.98,
        True,
        _over_program("hand-written JAX", ("gpt", "mlp")),
    ),
    Goal("at least 1.05 times PyTorch", 1.05, True, _over_program("PyTorch", ("gpt",))),
    Goal(
        "MFU at least 0.55 of the measured ceiling for the model of 1.3 B parameters",
        0.55,
        True,
        _utilisation,
    ),
    Goal("fp16 and bf16 peak memory at most 0.56 of fp32's", 0.56, False, _memory),
)
