"""Plots of runs, written as PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jmp_train.reports.progress import display_name
from jmp_train.types import DTypeLike, Json


def _pyplot() -> Any:
    import matplotlib as mpl  # 0.8 s to import, so only where used

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


_AXES = {
    "loss_scale": "loss scale",
    "grad_norm": "gradient norm before clipping, mean",
    "learning_rate": "learning rate",
}


def _series(records: Sequence[Json], split: str, name: str) -> tuple[list, list]:
    found = [(r["step"], float(r[name])) for r in records if r["split"] == split and name in r]
    return [step for step, _ in found], [value for _, value in found]


def plot_run(records: Sequence[Json], directory: Path, *, title: str) -> list[Path]:
    """Draw the curves of one run.

    Args:
      records: the records of its metrics.jsonl.
      directory: folder of the PNG files.
      title: title of each plot.

    Returns:
      The files: one for the loss and each metric of an evaluation; and one each for the loss
      scale, gradient norm and learning rate that vary.
    """
    plt = _pyplot()
    directory.mkdir(parents=True, exist_ok=True)
    evaluated = [
        k for r in records if r["split"] == "eval" for k in r if k not in ("step", "split")
    ]
    if_varying = ("loss_scale", "grad_norm", "learning_rate")
    names = list(dict.fromkeys(["loss", *evaluated, *if_varying]))
    files = []
    for name in names:
        curves = {split: _series(records, split, name) for split in ("train", "eval")}
        if name in if_varying and len({*curves["train"][1]}) < 2:
            continue
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for split, (steps, values) in curves.items():
            if steps:
                label = "held-out" if split == "eval" else split
                style = "o-" if split == "eval" else "-"
                axes.plot(steps, values, style, markersize=4, label=label)
        if name == "loss_scale":
            axes.set_yscale("log", base=2)
        axes.set(xlabel="step", ylabel=_AXES.get(name, display_name(name)), title=title)
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
    """Draw a comparison of precisions: the metric of every seed, and the time.

    Args:
      rows: by precision, `{"metric": one value per seed, "seconds": one value per seed}`, both
        empty where every seed diverged.
      path: the PNG file.
      metric: the name of the metric, for the axis.
      title: title of the plot.
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
    metric = display_name(metric)
    left.set(ylabel=f"held-out {metric}", title=f"{metric}: each seed, mean and deviation")
    right.set(ylabel="seconds", title="training time, mean over seeds")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_exponents(
    exponents: Mapping[int, int], dtype: DTypeLike, path: Path, *, scale: float, title: str
) -> None:
    """Draw how many numbers have which exponent, unscaled and scaled, over the range of a format.

    Figure 3 of Micikevicius et al. 2018, "Mixed Precision Training", with the scale's effect.

    Args:
      exponents: how many of the numbers have which exponent, floor(log2 |x|).
      dtype: the format.
      path: the PNG file.
      scale: what they are multiplied by.
      title: title of the plot.
    """
    plt = _pyplot()
    info = jnp.finfo(dtype)
    smallest, normal, end = (
        math.frexp(float(x))[1] - 1
        for x in (info.smallest_subnormal, info.smallest_normal, info.max)
    )
    total = max(sum(exponents.values()), 1)
    places = np.array(sorted(exponents))
    share = np.array([100 * exponents[e] / total for e in places])
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.bar(places, share, width=1.0, alpha=0.6, label="as they are")
    shift = math.log2(scale)
    if shift:
        axes.bar(places + shift, share, width=1.0, alpha=0.6, label=f"times {scale:g}")
    axes.axvspan(
        normal - 0.5, end + 0.5, alpha=0.12, zorder=0, color="C2", label=f"normal in {info.dtype}"
    )
    axes.axvspan(smallest - 0.5, normal - 0.5, alpha=0.12, zorder=0, color="C1", label="subnormal")
    axes.set(xlabel="exponent, floor(log2 |x|)", ylabel="share of numbers other than 0, %")
    axes.set_title(title)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
