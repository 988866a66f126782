"""One family of experiments across precisions and seeds, side by side."""

from __future__ import annotations

import dataclasses
import statistics
import typing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jmp_train.config.experiment import Experiment
from jmp_train.config.find import experiment_files, find_experiment
from jmp_train.config.warmup import fit_warmup
from jmp_train.errors import UsageError
from jmp_train.errors import nearest
from jmp_train.runs.plots import plot_comparison
from jmp_train.runs.train import devices_line, train, where
from jmp_train.runs.loop import Diverged
from jmp_train.runs.metrics import write_json

_MATMUL = typing.get_args(typing.get_type_hints(Experiment)["matmul_precision"])


def families() -> list[str]:
    """The names of all families: what stands before the precision in an experiment's name."""
    return sorted({name.rpartition("_")[0] for name in experiment_files()} - {""})


def variants_of(family: str, precisions: str) -> dict[str, Experiment[Any, Any]]:
    """The experiments to compare, by label, the first being what the others are compared with.

    Args:
      family: such as `mlp`.
      precisions: comma-separated: `fp32` is the experiment `<family>_fp32`, and `fp32@highest` the
        same with `matmul_precision` highest.

    Raises:
      UsageError: for a family or a precision that does not exist, with the nearest that does.
    """
    names = list(experiment_files())
    there = [name.removeprefix(family + "_") for name in names if name.startswith(family + "_")]
    if not there:
        raise UsageError(f"unknown family {family!r}; {nearest(family, families())}")
    variants = {}
    for label in filter(None, (word.strip() for word in precisions.split(","))):
        precision, _, matmul = label.partition("@")
        if precision not in there:
            raise UsageError(
                f"{family} has no precision {precision!r}; {nearest(precision, there)}"
            )
        if matmul and matmul not in _MATMUL:
            raise UsageError(f"unknown matmul precision {matmul!r}; {nearest(matmul, _MATMUL)}")
        experiment = find_experiment(f"{family}_{precision}")
        if matmul:
            experiment = dataclasses.replace(experiment, matmul_precision=matmul)
        variants[label] = experiment
    if not variants:
        raise UsageError(f"no precision in {precisions!r}; expected some of {', '.join(there)}")
    return variants


def compare(
    family: str,
    variants: dict[str, Experiment[Any, Any]],
    *,
    seeds: int,
    out: Path,
    console: Console,
) -> dict[str, Any]:
    """Trains each variant with each seed, then prints, writes and draws the comparison.

    The seeds go outermost, so that a machine that slows down slows all variants alike. A run that
    diverges is counted, and left out of its row's means.

    Args:
      family: its name.
      variants: by label; the first is what speed-ups are against.
      seeds: runs of each, at least 1.
      out: gets the runs, compare.json, compare.md and compare.png.
      console: where to print.

    Returns:
      What compare.json holds.

    Raises:
      UsageError: for a folder that cannot be written.
      Diverged: if every run did, after writing that down as well.
      Stopped: as `run.train`.
    """
    summaries: dict[str, list[dict[str, Any]]] = {label: [] for label in variants}
    diverged: dict[str, list[int]] = {label: [] for label in variants}  # their seeds
    quiet = Console(quiet=True)
    fitted = {label: fit_warmup(experiment) for label, experiment in variants.items()}
    variants = {label: experiment for label, (experiment, _) in fitted.items()}
    for line in dict.fromkeys([devices_line(), *(line for _, line in fitted.values())]):
        if line:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    for seed in range(seeds):
        for label, experiment in variants.items():
            run_dir = out / "runs" / f"{label}-seed{seed}"
            seeded = dataclasses.replace(experiment, seed=seed)
            try:
                summary = train(f"{family}_{label.partition('@')[0]}", seeded, run_dir, quiet)
            except Diverged as error:
                diverged[label].append(seed)
                message = f"{label} seed {seed} diverged: {str(error).splitlines()[0]}"
                console.print(message, highlight=False, markup=False, soft_wrap=True)
                continue
            summaries[label].append(summary)
            console.print(
                f"{label} seed {seed}: {experiment.metric.replace('_', ' ')} "
                f"{summary['eval'][experiment.metric]:.4f} in {summary['train_time_s']:.1f} s",
                highlight=False,
                markup=False,
            )
    metric = next(iter(variants.values())).metric
    rows = {
        label: _row(runs, metric)
        | {"policy": variants[label].policy, "diverged_seeds": diverged[label]}
        for label, runs in summaries.items()
    }
    reference = next(iter(rows.values()))["seconds"]["mean"]
    for row in rows.values():
        both = reference and row["seconds"]["mean"]
        row["speed_up"] = reference / row["seconds"]["mean"] if both else None
    result = {
        "family": family,
        "metric": metric,
        "seeds": seeds,
        **where(),
        "rows": rows,
    }
    write_json(out / "compare.json", result)
    table = markdown_table(result)
    (out / "compare.md").write_text(table, encoding="utf-8")
    plot_comparison(
        {
            k: {"metric": r[metric]["values"], "seconds": r["seconds"]["values"]}
            for k, r in rows.items()
        },
        out / "compare.png",
        metric=metric,
        title=f"{family}, {seeds} seed{'s' * (seeds > 1)}, {result['device']['kind']}",
    )
    console.print(_rich_table(result))
    console.print(f"{out}", highlight=False, markup=False, soft_wrap=True)
    if not any(summaries.values()):
        raise Diverged(f"every run of {family} diverged")
    return result


def _row(runs: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, Any]:
        mean = statistics.fmean(values) if values else None
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return {"mean": mean, "std": deviation, "values": values}

    return {
        "seconds": spread([run["train_time_s"] for run in runs]),
        metric: spread([run["eval"][metric] for run in runs]),
        "loss_scale": [run["loss_scale"] for run in runs],
        "skipped_steps": [run["skipped_steps"] for run in runs],
        "peak_memory_bytes": max((run["peak_memory_bytes"] for run in runs), default=None),
    }


def _cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    metric = result["metric"]
    header = [
        "precision",
        "time (s)",
        "speed-up",
        metric.replace("_", " "),
        "loss scale",
        "skipped",
        "peak memory (MiB)",
    ]
    rows = []
    for label, row in result["rows"].items():
        lost = len(row["diverged_seeds"])
        if not row["seconds"]["values"]:
            rows.append([label, "", "", f"diverged ({lost} of {lost})", "", "", ""])
            continue
        scales = sorted({f"{scale:g}" for scale in row["loss_scale"]}, key=float)
        some = f" ({lost} of {result['seeds']} diverged)" if lost else ""
        speed_up = row["speed_up"]
        rows.append(
            [
                label,
                f"{row['seconds']['mean']:.2f}",
                "" if speed_up is None else f"{speed_up:.2f}",
                f"{row[metric]['mean']:.4f} ± {row[metric]['std']:.4f}{some}",
                ", ".join(scales),
                f"{statistics.fmean(row['skipped_steps']):g}",
                f"{row['peak_memory_bytes'] / 2**20:.1f}",
            ]
        )
    return header, rows


def markdown_table(result: dict[str, Any]) -> str:
    """A comparison as a Markdown table.

    Args:
      result: what `compare` returns.
    """
    header, rows = _cells(result)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rich_table(result: dict[str, Any]) -> Table:
    header, rows = _cells(result)
    table = Table(box=None, header_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 3)
    for row in rows:
        table.add_row(*row)
    return table
