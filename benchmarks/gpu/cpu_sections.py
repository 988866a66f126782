"""What each benchmark in `benchmarks/` asks, and the sentence that its committed result answers with."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.tables import number, origin, read_json, rows_tables, settings_line


class Question(NamedTuple):
    """A benchmark's question."""

    text: str
    answer: Callable[[Any], str]
    """Rows to a sentence with figures of theirs."""
    plots: tuple[str, ...] = ()
    """PNG files beside the JSON, by the part of their names before the device."""


ELSEWHERE = {  # results whose tables are on pages of their own
    "plans": "[On paper](paper.md) and [several devices](scale.md) have their tables.",
    "published_models": "[The table of models](published-models.md).",
}


def section(path: Path, *, results: str) -> str:
    """Return the section of one result file.

    Args:
      path: the JSON.
      results: where the page finds files that lie beside it, a relative path.
    """
    data = read_json(path)
    name, device = data["benchmark"], path.stem.removeprefix(data["benchmark"] + "-")
    question = QUESTIONS.get(name, Question(name.replace("_", " "), lambda rows: ""))
    if name in ELSEWHERE:
        tables = [ELSEWHERE[name]]
    else:
        tables = rows_tables(data["rows"])
    plots = (
        f"![{question.text}]({results}/{plot}-{device}.png)"
        for plot in question.plots
        if (path.parent / f"{plot}-{device}.png").exists()
    )
    parts = [
        f"### {question.text}",
        question.answer(data["rows"]),
        *tables,
        *plots,
        settings_line(data),
        origin(data),
    ]
    return "\n\n".join(part for part in parts if part)


def _step(rows: Any) -> str:
    rivals = [row for row in rows if row["loop"] != "jmp_train"]
    worst = max(rivals, key=lambda row: row["ours_over_this"])
    return (
        f"A step of jmp_train takes at most {number(worst['ours_over_this'])} times that of the "
        f"loop that it is compared with ({worst['policy']}, {worst['loop']})."
    )


def _skipping(rows: Any) -> str:
    ways = {(row["size"], row["way"]): row for row in rows}
    costs = [
        f"{number(row['over_never'])} ({size})"
        for (size, way), row in ways.items()
        if way == "jmp_train" and "over_never" in row
    ]
    if costs:
        return f"The step that may skip takes {', '.join(costs)} times one that never does."
    traffic = [
        f"{number(row['megabytes_accessed'] / ways[size, 'never']['megabytes_accessed'])} ({size})"
        for (size, way), row in ways.items()
        if way == "jmp_train"
    ]
    return f"Of the bytes of a step that never skips, one that may accesses {', '.join(traffic)}."


def _memory(rows: Any) -> str:
    shares = ", ".join(f"{name} {number(row['of_float32'])}" for name, row in rows.items())
    return f"Temporary memory as a share of float32's: {shares}."


def _parameters(rows: Any) -> str:
    half = [row for row in rows if row["parameters"] not in ("float32", "direct")]
    worst = max(half, key=lambda row: row["time_over_float32"])
    least = min(half, key=lambda row: row["bytes_per_parameter"])
    return (
        f"The smallest takes {number(least['bytes_per_parameter'])} bytes a parameter with the "
        f"optimizer's state ({least['optimizer']}, {least['parameters']}), and none more than "
        f"{number(worst['time_over_float32'])} times float32's step "
        f"({worst['optimizer']}, {worst['parameters']})."
    )


def _autocast(rows: Any) -> str:
    libraries = dict.fromkeys(library for row in rows.values() for library in row)
    counts = (
        f"{library} {sum(row.get(library, {}).get('handled', False) for row in rows.values())}"
        for library in libraries
    )
    return f"Of {len(rows)} kinds of program, handled by {', '.join(counts)}."


def _kahan(rows: Any) -> str:
    finest: dict[str, str] = {}
    for row in rows:
        if row["lowest_share"] >= 0.75 and row["highest_share"] <= 1.25:
            finest[row["format"]] = row["addition"]
    limits = ", ".join(f"{limit} in {name}" for name, limit in finest.items())
    return f"Sums are within a quarter of the exact one down to additions of {limits}."


def _loss_scale(rows: Any) -> str:
    skipped = [len(rows["skipped_steps"]), len(rows["scales"])]
    flushed = (row["share_flushed_by_rounding"] for row in rows["gradients"])
    scaled = (row["share_flushed_by_rounding_scaled"] for row in rows["gradients"])
    return (
        f"{skipped[0]} of {skipped[1]} steps are skipped. At most {number(100 * max(flushed))} % of "
        f"the gradients are flushed to zero without the scale, {number(100 * max(scaled))} % with it."
    )


def _start(rows: Any) -> str:
    seconds = {row["what"]: row["median"] for row in rows}
    return "Medians: " + ", ".join(f"{what} {number(s)} s" for what, s in seconds.items()) + "."


def _batches(rows: Any) -> str:
    ratios = [row["ratio"] for row in rows if row["batches"] == "train_batches"]
    low, high = number(min(ratios)), number(max(ratios))
    return (
        f"`train_batches` makes batches of arrays {low} to {high} times as fast as Grain's pipeline of "
        "single examples; for arrays on the device, only row numbers are made."
    )


def _loop(rows: Any) -> str:
    ratios = {row["case"]: row["ratio"] for row in rows if row["loop"] == "train"}
    return (
        "`train` over a hand-written loop: "
        + ", ".join(f"{case} {number(ratio)}" for case, ratio in ratios.items())
        + "."
    )


def _data(rows: Any) -> str:
    ours: dict[str, float] = {}
    for row in rows:
        if row["reader"] == "jmp_train":
            ours[row["source"]] = max(ours.get(row["source"], 0.0), row["ratio"])
    return (
        "The fastest of 0 to 2 workers, over the fastest other library: "
        + ", ".join(f"{source} {number(ratio)}" for source, ratio in ours.items())
        + "."
    )


def _waiting(rows: Any) -> str:
    return (
        "Waiting for data takes "
        + ", ".join(f"{row['waiting_share']:.2%} ({row['experiment']})" for row in rows)
        + " of the step time."
    )


def _plans(rows: Any) -> str:
    devices = sorted({row["device"] for row in rows.values()})
    fitting = sum(row["fits"] for row in rows.values())
    return f"{len(rows)} plans for {', '.join(devices)}, of which {fitting} fit."


def _plan(rows: Any) -> str:
    ratios = [row["measured_over_planned"] for row in rows.values()]
    return (
        f"The peak of {len(rows)} runs is {number(min(ratios))} to {number(max(ratios))} of what "
        "`jmp-train plan` says."
    )


def _baselines(rows: Any) -> str:
    best = (f"{family} {number(max(row.values()))}" for family, row in rows.items())
    return f"The best held-out accuracy of a classical model: {', '.join(best)}."


def _comparison(rows: Any) -> str:
    says = []
    for name, row in rows.items():
        if "equivalence" in row:
            shown = (
                "equivalent" if row["equivalence"]["equivalent"] else "not shown to be equivalent"
            )
            difference = number(row["equivalence"]["difference"])
            says.append(f"{name} is {shown} to {row['against']} (mean difference {difference})")
    return "By paired tests over seeds, " + "; ".join(says) + "." if says else ""


def _models(rows: Any) -> str:
    def runs(row: Any) -> bool:
        parts = (row, row.get("bfloat16", {}), row.get("float16", {}))
        losses = (float(part.get("loss", 0)) for part in parts)
        return not any("failure" in part for part in parts) and all(map(math.isfinite, losses))

    return f"{sum(map(runs, rows.values()))} of {len(rows)} published models train unedited in both formats."


QUESTIONS = {
    "step": Question("How does a step compare with loops written by hand?", _step),
    "skipping": Question("What does it cost that a step may be skipped?", _skipping),
    "skipping-for-tpu": Question("What does that cost on a TPU?", _skipping),
    "memory": Question("How much memory do autocast and a policy save?", _memory),
    "memory-for-tpu": Question("How much memory do autocast and a policy save on a TPU?", _memory),
    "parameters": Question("What do the kinds of 16-bit parameters cost?", _parameters),
    "autocast": Question("Which programs does autocast handle?", _autocast),
    "kahan": Question("How small may an update be for `kahan` to count it?", _kahan),
    "loss_scale": Question(
        "What does the loss scale do to the gradients of a run?",
        _loss_scale,
        ("loss_scale", "flushed_gradients"),
    ),
    "start": Question("How long does it take to start?", _start),
    "batches": Question("How fast are batches of arrays made?", _batches),
    "loop": Question("How fast is the loop of `train`?", _loop),
    "data": Question("How fast are examples read from files?", _data),
    "data_waiting": Question("How long does a run wait for data?", _waiting),
    "compare_cnn": Question(
        "Do fp16 and bf16 reach fp32's accuracy with batch norm?", _comparison, ("compare_cnn",)
    ),
    "compare_vit": Question("Do they with a vision transformer?", _comparison, ("compare_vit",)),
    "image_baselines": Question("How well do classical models read the same images?", _baselines),
    "compare_mlp": Question(
        "Do fp16 and bf16 reach fp32's accuracy on digits?", _comparison, ("compare_mlp",)
    ),
    "compare_gpt": Question(
        "Do fp16 and bf16 reach fp32's loss on text?", _comparison, ("compare_gpt",)
    ),
    "plan": Question("Is the memory of a plan what a run takes on a GPU?", _plan),
    "published_models": Question("Do published models run?", _models),
    "plans": Question("What do models of 1 to 78 billion parameters need?", _plans),
}
