"""One family of experiments across precisions and seeds, side by side."""

from __future__ import annotations

import dataclasses
import statistics
import typing
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jmp_train.config.experiment import AnyExperiment, Experiment
from jmp_train.config.find import experiment_files, find_experiment
from jmp_train.config.warmup import fit_warmup
from jmp_train.errors import UsageError, nearest
from jmp_train.records.metrics import write_json
from jmp_train.records.provenance import device_and_versions
from jmp_train.reports.plots import plot_comparison
from jmp_train.reports.progress import display_name, print_line
from jmp_train.runs.loop import Diverged
from jmp_train.runs.train import train
from jmp_train.types import Json

_MATMUL = typing.get_args(typing.get_type_hints(Experiment)["matmul_precision"])


def families() -> list[str]:
    """Return the names of all families: an experiment's name without its precision."""
    return sorted({name.rpartition("_")[0] for name in experiment_files()} - {""})


def variants_of(family: str, precisions: str) -> dict[str, AnyExperiment]:
    """Return the experiments to compare by label; the others are compared with the first.

    Args:
      family: the name of a family, such as `mlp`.
      precisions: comma-separated: `fp32` is the experiment `<family>_fp32`, and `fp32@highest` the
        same with `matmul_precision` highest.

    Raises:
      UsageError: for an unknown family or precision, with the nearest one that exists.
    """
    names = list(experiment_files())
    there = [name.removeprefix(family + "_") for name in names if name.startswith(family + "_")]
    if not there:
        raise UsageError(f"unknown family {family!r}; {nearest(family, families())}")
    variants = {}
    for label in filter(None, (part.strip() for part in precisions.split(","))):
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
    variants: dict[str, AnyExperiment],
    *,
    seeds: int,
    out: Path,
    console: Console,
) -> Json:
    """Train each variant with each seed, then print, write and draw the comparison.

    The loop over seeds is the outer one, so that a machine that slows down slows all variants alike.
    A run that diverges is counted, and left out of its row's means.

    Args:
      family: the name of the family.
      variants: experiments by label; speed-ups are relative to the first.
      seeds: number of runs of each variant, at least 1.
      out: folder of the runs, compare.json, compare.md and compare.png.
      console: where to print.

    Returns:
      The content of compare.json.

    Raises:
      UsageError: for a folder that cannot be written.
      Diverged: if every run diverged; the results are written before.
      Stopped: as `jmp_train.runs.train.train`.
    """
    summaries: dict[str, list[Json]] = {label: [] for label in variants}
    diverged: dict[str, list[int]] = {label: [] for label in variants}  # their seeds
    fitted = {label: fit_warmup(experiment) for label, experiment in variants.items()}
    variants = {label: experiment for label, (experiment, _) in fitted.items()}
    for line in dict.fromkeys(line for _, line in fitted.values()):
        if line:
            print_line(console, line)
    for seed in range(seeds):
        for label, experiment in variants.items():
            run_dir = out / "runs" / f"{label}-seed{seed}"
            seeded = dataclasses.replace(experiment, seed=seed)
            try:
                member = f"{family}_{label.partition('@')[0]}"
                summary = train(seeded, run_dir, name=member)
            except Diverged as error:
                diverged[label].append(seed)
                message = f"{label} seed {seed} diverged: {str(error).splitlines()[0]}"
                print_line(console, message)
                continue
            summaries[label].append(summary)
            value = f"{summary['eval'][experiment.metric]:.4f}"
            print_line(
                console,
                f"{label} seed {seed}: {display_name(experiment.metric)} {value} "
                f"in {summary['train_time_s']:.1f} s",
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
        **device_and_versions(),
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
    print_line(console, f"{out}")
    if not any(summaries.values()):
        raise Diverged(f"every run of {family} diverged")
    return result


def _row(runs: list[Json], metric: str) -> Json:
    def spread(values: list[float]) -> Json:
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


def _cells(result: Json) -> tuple[list[str], list[list[str]]]:
    metric = result["metric"]
    header = [
        "precision",
        "time (s)",
        "speed-up",
        display_name(metric),
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


def markdown_table(result: Json) -> str:
    """Return a comparison as a Markdown table.

    Args:
      result: the value that `compare` returned.
    """
    header, rows = _cells(result)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rich_table(result: Json) -> Table:
    header, rows = _cells(result)
    table = Table(box=None, header_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 3)
    for row in rows:
        table.add_row(*row)
    return table
