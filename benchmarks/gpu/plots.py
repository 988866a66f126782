"""Plots of the GPU report: rate and peak memory by precision and program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.goals import GPTS
from benchmarks.gpu.results import LOSS_BOUND, PRECISIONS, PROGRAMS, Result, Row

_UNCOUNTED: dict[str, Any] = {"hatch": "///", "alpha": 0.4}
_WRONG = f"loss not shown to be within {LOSS_BOUND} nats of fp32's"


def draw(result: Result, directory: Path) -> list[Path]:
    """Draw the plots of a result file that have data.

    Args:
      result: the file.
      directory: where the PNG files go; made where it is missing.

    Returns:
      The files, of the names that `files` gives.
    """
    drawn = []
    for path, (value, label) in zip(files(result, directory), _figures(result), strict=True):
        directory.mkdir(parents=True, exist_ok=True)
        _bars(result, path, value, label)
        drawn.append(path)
    return drawn


def files(result: Result, directory: Path) -> list[Path]:
    """Return the plots that a result file has data for."""
    stem = Path(result.name).stem
    return [directory / f"{stem}-{label.split(',')[0].replace(' ', '-')}.png"
            for _, label in _figures(result)]  # fmt: skip


def _figures(result: Result) -> list[tuple[Callable[[Row], float | None], str]]:
    figures = (
        (lambda row: row.rate, "tokens a second"),
        (_memory, "peak memory, GiB"),
    )
    return [
        (value, label)
        for value, label in figures
        if any(_values(result, workload, value) for workload in GPTS)
    ]


def _memory(row: Row) -> float | None:
    count = row.data.get("peak_memory_bytes")
    return None if count is None else count / 2**30


def _values(
    result: Result, workload: str, value: Callable[[Row], float | None]
) -> dict[tuple[str, str], tuple[float, bool]]:
    """Return the figures by precision and program, and whether each counts."""
    rows = {(p, g): result.row(workload, p, g) for p in PRECISIONS for g in PROGRAMS}
    found = {key: (value(row), row.counts) for key, row in rows.items() if row is not None}
    return {key: (x, counts) for key, (x, counts) in found.items() if x is not None}


def _bars(result: Result, path: Path, value: Callable[[Row], float | None], label: str) -> None:
    import matplotlib as mpl  # slow to import, and not there on every GPU machine

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    by_workload = {w: v for w in GPTS if (v := _values(result, w, value))}
    figure, axes = plt.subplots(
        1,
        len(by_workload),
        figsize=(5.5 * len(by_workload), 4),
        layout="constrained",
        squeeze=False,
    )
    width = 0.8 / len(PROGRAMS)
    seen: set[str] = set()
    for ax, (workload, values) in zip(axes[0], by_workload.items(), strict=True):
        for (precision, program), (height, counts) in values.items():
            i = PROGRAMS.index(program)
            x = PRECISIONS.index(precision) + (i - (len(PROGRAMS) - 1) / 2) * width
            ax.bar(x, height, width, color=f"C{i}", **({} if counts else _UNCOUNTED))
            seen |= {program} if counts else {program, _WRONG}
        ax.set_xticks(range(len(PRECISIONS)), PRECISIONS)
        ax.set(title=workload, xlabel="precision", ylabel=label, xlim=(-0.6, len(PRECISIONS) - 0.4))
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 10 or y == 0 else f"{y:.3g}")
        ax.grid(axis="y", alpha=0.3)
        ax.set_axisbelow(True)
    handles = [Patch(color=f"C{i}", label=program) for i, program in enumerate(PROGRAMS)]
    handles.append(Patch(facecolor="grey", label=_WRONG, **_UNCOUNTED))
    shown = [handle for handle in handles if handle.get_label() in seen]
    columns = min(len(shown), 3 * len(by_workload))
    figure.legend(handles=shown, loc="outside lower center", ncols=columns, fontsize=9)
    what = label.split(",")[0]
    figure.suptitle(f"{what[0].upper()}{what[1:]} of a training step, {result.device}")
    figure.savefig(path, dpi=120)
    plt.close(figure)
