"""Renders docs/benchmarks.md, its plots and the README's table from the result files.

`python -m benchmarks.gpu.report` reads every JSON in benchmarks/results; with `--toy` it reads
`runs/bench-gpu-toy/gpu-cpu.json` and renders `runs/bench-gpu-toy/benchmarks.md`, nothing else.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu.cpu_sections import QUESTIONS, section
from benchmarks.gpu.plots import draw, files
from benchmarks.gpu.question_sections import questions_section
from benchmarks.gpu.results import LOSS_BOUND, RESULTS, Result, read
from benchmarks.gpu.speed_sections import (
    ceiling_section,
    goals_section,
    short_table,
    workload_section,
)
from benchmarks.gpu.table import ROWS, workload

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
TOY = ROOT / "runs" / "bench-gpu-toy" / "gpu-cpu.json"
BEGIN, END = "<!-- gpu table -->", "<!-- end of gpu table -->"

_HEAD = """# Benchmarks

Rendered by `make bench-report` from the JSON files in `benchmarks/results/`; edits here are lost.
`make bench-gpu` measures the GPU rows, the most useful first, and resumes where it was stopped."""

_LEGEND = f"""Precisions: fp32 is float32 with products at highest precision ("strict"), tf32 float32 with the GPU's
default products, fp16 float16 compute with a dynamic loss scale, bf16 bfloat16 compute; parameters
and optimizer state are float32 in all. Programs: `jmp_train` is `make_step`; `autocast` and
`apply_policy` are those functions around plain float32 code; "hand-written JAX" is the best step
written without this package; PyTorch uses `torch.compile`, SDPA, fused AdamW, `autocast` and
`GradScaler`. The batch is equal for all programs of a workload.

Speed-up and memory's share are against jmp_train's strict fp32 step. Model FLOPs are 6 N + 12 L T W
a token (N parameters, the embedding counted once, as the head that it is tied to; L blocks, T tokens
of length, W width) and 6 N an example of an MLP; MFU is their rate over the datasheet's, and over
the measured rate of matrix products. A row whose loss after 100 steps is not within {LOSS_BOUND} nats
of that of jmp_train's strict fp32 step does not count: its speed-up is struck through. Where one of the
two took fewer steps in its time, the loss is compared after the last step that both kept. SM clock
and power are medians over the samples, four a second, in which the GPU was busy."""

_MLP = """mlp_wide has four layers of 4,096. mlp_digits is so small that launching its steps costs more than
the arithmetic, so it is measured with 50 steps a dispatch too."""


_IMAGES = """resnet50 is ResNet-50 and vit_b ViT-B with patches of 16, on images of 224 pixels and 1,000 classes: each
class has a pattern of 8 x 8 colours, which noise hides. An image counts 6 FLOPs for each multiplication of its
forward pass. PyTorch's networks begin with the same parameters, have their channels last, and pad convolutions
alike on both sides.

The rows of vit_b were measured with attention over all pairs at once. Since then, attention goes by blocks and the
GELU is computed again in the backward pass. That was compiled for an H100 and not run on one: at batch 32,
temporaries in bf16 are 2.22 GiB in place of 3.06."""


def page(
    results: Sequence[Result], others: Sequence[Path], *, figures: Path, directory: Path
) -> str:
    """Return the report.

    Args:
      results: of the GPU benchmark.
      others: result files of the other benchmarks.
      figures: where the plots are.
      directory: where the report will be.
    """
    relative = lambda path: Path(os.path.relpath(path, directory)).as_posix()
    plots = [(result, file) for result in results for file in files(result, figures)]
    parts = [
        _HEAD,
        "## How fast is a training step on a GPU in each precision?",
        _LEGEND,
        *_speeds(results, lambda kind: kind == "gpt"),
        *(f"![{_caption(file, result)}]({relative(file)})" for result, file in plots),
        ceiling_section(results),
        "## Are the goals reached?",
        goals_section(results),
        questions_section(results),
        "## How fast are multilayer perceptrons on a GPU?",
        _MLP,
        *_speeds(results, lambda kind: kind == "mlp"),
        "## How fast are networks for images on a GPU?",
        _IMAGES,
        *_speeds(results, lambda kind: kind in ("resnet", "vit")),
    ]
    if others:
        ordered = sorted(others, key=_place)
        where = relative(others[0].parent)
        parts += ["## What do the other benchmarks say?"]
        parts += [section(path, results=where) for path in ordered]
    return "\n\n".join(parts) + "\n"


def with_table(readme: str, table: str) -> str:
    """Return the README with another table between its marks.

    Raises:
      ValueError: for a README without both marks.
    """
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md has no table between {BEGIN} and {END}")
    before, rest = readme.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}"


def committed() -> tuple[list[Result], list[Path]]:
    """Return the GPU benchmark's results and the files of the other benchmarks."""
    paths = sorted(RESULTS.glob("*.json"))
    gpu = [path for path in paths if path.name.startswith("gpu-")]
    return read(gpu), [path for path in paths if path not in gpu]


def rendered() -> tuple[str, str]:
    """Return docs/benchmarks.md and README.md as the committed results render them."""
    results, others = committed()
    text = page(results, others, figures=PAGE.parent / "figures", directory=PAGE.parent)
    return text, with_table(README.read_text(), short_table(results))


def main(words: Sequence[str] | None = None) -> None:
    """Write the report; `words` are the command line's, by default this process's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true", help="Render the result of a toy run alone.")
    parser.add_argument("--result", type=Path, default=TOY, help="Toy run's JSON.")
    options = parser.parse_args(words)
    if options.toy:
        if not options.result.exists():
            parser.error(
                f"{options.result} is not there; expected the JSON of make bench-gpu TOY=1"
            )
        results, directory = read([options.result]), options.result.parent
        text = page(results, [], figures=directory / "figures", directory=directory)
        (directory / "benchmarks.md").write_text(text)
        print(directory / "benchmarks.md")
    else:
        (results, _), directory = committed(), PAGE.parent
        text, readme = rendered()
        PAGE.write_text(text)
        README.write_text(readme)
        print(PAGE)
    for result in results:
        for file in draw(result, directory / "figures"):
            print(file)


def _speeds(results: Sequence[Result], wanted: Callable[[str], bool]) -> list[str]:
    """Return the sections of the workloads of some kinds."""
    found = [workload(name, False) for name in dict.fromkeys(row.workload for row in ROWS)]
    return [workload_section(results, w.name, w.unit) for w in found if wanted(w.kind)]


def _caption(file: Path, result: Result) -> str:
    what = file.stem.removeprefix(Path(result.name).stem + "-").replace("-", " ")
    return f"{what} by precision and program, {result.device}".capitalize()


def _place(path: Path) -> tuple[int, str]:
    names = list(QUESTIONS)
    benchmark = next(
        (n for n in sorted(names, key=len, reverse=True) if path.stem.startswith(n + "-")), ""
    )
    return (names.index(benchmark) if benchmark else len(names), path.name)


if __name__ == "__main__":
    main()
