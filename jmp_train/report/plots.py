"""Plots of runs, written as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def _pyplot() -> Any:
    import matplotlib as mpl  # 0.8 s to import, so only where used

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _series(records: Sequence[dict[str, Any]], split: str, name: str) -> tuple[list, list]:
    found = [(r["step"], float(r[name])) for r in records if r["split"] == split and name in r]
    return [step for step, _ in found], [value for _, value in found]


def plot_run(records: Sequence[dict[str, Any]], directory: Path, *, title: str) -> list[Path]:
    """Draws the curves of one run.

    Args:
      records: those of its metrics.jsonl.
      directory: where the PNG files go.
      title: stands above each.

    Returns:
      The files: one per metric, and the loss scale where it is not 1 throughout.
    """
    plt = _pyplot()
    directory.mkdir(parents=True, exist_ok=True)
    evaluated = [
        k for r in records if r["split"] == "eval" for k in r if k not in ("step", "split")
    ]
    names = list(dict.fromkeys(["loss", *evaluated, "loss_scale"]))
    files = []
    for name in names:
        curves = {split: _series(records, split, name) for split in ("train", "eval")}
        if name == "loss_scale" and set(curves["train"][1]) <= {1.0}:
            continue
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for split, (steps, values) in curves.items():
            if steps:
                label = "held-out" if split == "eval" else split
                style = "o-" if split == "eval" else "-"
                axes.plot(steps, values, style, markersize=4, label=label)
        if name == "loss_scale":
            axes.set_yscale("log", base=2)
        axes.set(xlabel="step", ylabel=name.replace("_", " "), title=title)
        axes.grid(alpha=0.3)
        if len([1 for steps, _ in curves.values() if steps]) > 1:
            axes.legend()
        files.append(directory / f"{name}.png")
        figure.savefig(files[-1], dpi=120)
        plt.close(figure)
    return files


def plot_comparison(
    rows: Mapping[str, Mapping[str, Sequence[float]]], path: Path, *, metric: str, title: str
) -> None:
    """Draws a comparison of precisions: the metric of every seed, and the time.

    Args:
      rows: by precision, `{"metric": one value per seed, "seconds": one value per seed}`, both
        empty where every seed diverged.
      path: the PNG file.
      metric: its name, for the axis.
      title: stands above.
    """
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    names = list(rows)
    for i, name in enumerate(names):
        values = np.asarray(rows[name]["metric"], float)
        if not len(values):
            left.text(i, 0.5, "diverged", transform=left.get_xaxis_transform(), ha="center")
            continue
        left.plot(i + np.linspace(-0.2, 0.2, len(values)), values, "o", alpha=0.5, color=f"C{i}")
        left.errorbar(
            i,
            values.mean(),
            yerr=values.std(ddof=1) if len(values) > 1 else 0,
            fmt="_",
            color="black",
            capsize=6,
            markersize=16,
        )
        right.bar(i, np.mean(rows[name]["seconds"]), color=f"C{i}")
    for axes in (left, right):
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.grid(axis="y", alpha=0.3)
    left.set(ylabel=f"held-out {metric}", title=f"{metric}: each seed, mean and deviation")
    right.set(ylabel="seconds", title="training time, mean over seeds")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
