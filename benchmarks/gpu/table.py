"""What is measured: the workloads, and the rows in the order of their worth.

A new family joins by an entry in `WORKLOADS` and its rows in `ROWS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu import images

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
QUESTIONS = ("loss_scale", "attention", "remat", "naming", "accumulation", "xla_flags")


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes of a network and of its batches."""

    name: str
    kind: str
    """"gpt", "mlp", "resnet", "vit" or "ceiling"."""
    width: int
    """Features of a token, of a hidden layer or of the first stage of a "resnet"; of "ceiling", rows
    and columns of a matrix."""
    depth: int = 0
    """Blocks, or hidden layers."""
    heads: int = 0
    """Attention heads of a "gpt" or a "vit"."""
    length: int = 0
    """Tokens of a window, for a "gpt"."""
    remat: str = "none"
    """What the backward pass of a "gpt" computes again: "none", "dots" or "full"."""
    loss_chunk: int = 1024
    """Tokens whose logits are in memory at once; a vocabulary of 256 needs few chunks."""
    features: int = 0
    """Inputs of an "mlp"; height and width of an image of a "resnet" or a "vit"."""
    classes: int = 256
    """Outputs; of a "gpt", the vocabulary."""
    batch: int = 0
    """Windows or examples of a batch; of a "gpt", for when what fits could not be found out."""
    learning_rate: float = 1e-3
    pool: int = 100
    """Different batches, used in turn."""
    size: str = ""
    """Of a "resnet" or a "vit", the size in `jmp_train.models`."""
    patch: int = 0
    """Height and width of a patch of a "vit"."""

    @property
    def unit(self) -> str:
        """What `per_second` counts."""
        return "tokens" if self.kind == "gpt" else "examples"

    def flops(self, parameters: int) -> int:
        """Model FLOPs of a training step for one token or one example.

        6 N, two products' worth forward and four backward for each parameter; and for attention
        12 L T W (L blocks, T tokens of a window, W features), counted without the causal mask.
        N counts the embedding once, as the output head that it is tied to. An image counts 6 for each
        multiplication of its forward pass.

        Source: Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, appendix B.
        """
        if self.kind in ("resnet", "vit"):
            return 6 * images.products(self)
        attention = 12 * self.depth * self.length * self.width if self.kind == "gpt" else 0
        return 6 * parameters + attention


_IMAGES: Any = {"features": 224, "classes": 1000, "batch": 128, "learning_rate": 1e-4, "pool": 4}
_FULL = (
    Workload("ceiling", "ceiling", 8192),
    Workload("gpt_124m", "gpt", 896, 13, 14, 1024, "dots", 32768, batch=32, learning_rate=6e-4),
    Workload("gpt_1b3", "gpt", 2048, 26, 16, 2048, "dots", 32768, batch=4, learning_rate=2e-4),
    Workload("mlp_wide", "mlp", 4096, 4, features=4096, classes=16, batch=8192, pool=4),
    Workload("mlp_digits", "mlp", 256, 2, features=64, classes=10, batch=128),
    Workload("resnet50", "resnet", 64, size="50", **_IMAGES),
    Workload("vit_b", "vit", 768, 12, 12, size="B", patch=16, **_IMAGES),
)
_TOY = (
    Workload("ceiling", "ceiling", 256),
    Workload("gpt_124m", "gpt", 32, 2, 2, 16, "dots", batch=4, learning_rate=6e-4),
    Workload("gpt_1b3", "gpt", 32, 3, 2, 32, "dots", batch=4, learning_rate=2e-4),
    Workload("mlp_wide", "mlp", 64, 4, features=64, classes=16, batch=64, pool=4),
    Workload("mlp_digits", "mlp", 32, 2, features=64, classes=10, batch=32),
    Workload("resnet50", "resnet", 16, size="tiny", **{**_IMAGES, "features": 33, "batch": 8}),
    Workload(
        "vit_b", "vit", 96, 4, 3, size="tiny", patch=8, **{**_IMAGES, "features": 32, "batch": 8}
    ),
)


def workload(name: str, toy: bool) -> Workload:
    """The workload of a name, at full or at toy size."""
    return next(w for w in (_TOY if toy else _FULL) if w.name == name)


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing to measure, in a process of its own."""

    workload: str
    precision: str
    """"fp32" (highest precision), "tf32", "fp16" (dynamic loss scale) or "bf16"."""
    program: str
    """"jmp_train", "autocast", "apply_policy", "hand-written JAX" or "PyTorch"."""
    options: tuple[tuple[str, str], ...] = ()
    """Names and values that differ from the program's usual ones."""
    question: str = ""
    """The question that it belongs to, if not to the comparison of programs."""
    part: int = 1
    """Which stretch of about nine minutes measures it."""

    @property
    def id(self) -> str:
        """Names it in the result file.

        >>> Row("gpt_124m", "bf16", "jmp_train", (("remat", "full"),)).id
        'gpt_124m/bf16/jmp_train/remat=full'
        """
        options = (f"{name}={value}" for name, value in self.options)
        return "/".join((self.workload, self.precision, self.program, *options))

    @property
    def steps_seconds(self) -> float:
        """Time for its steps, beyond which it stops at 20 timed ones."""
        if self.question:
            return 10.0
        if self.program == "jmp_train" and self.precision == "fp32":
            return (
                60.0  # the losses are compared at the last step that it takes, of 10, 20, 50, 100
            )
        return 60.0 if self.precision == "fp32" else 40.0

    @property
    def limit(self) -> float:
        """Seconds after which its process is killed: its steps, start and compilation."""
        return self.steps_seconds + (180.0 if self.workload == "gpt_1b3" else 120.0)

    @property
    def planned_s(self) -> float:
        """Seconds that it should take on an H100, by an estimate from FLOPs and compile times."""
        torch = 25.0 if self.program == "PyTorch" else 0.0  # torch.compile
        if self.workload == "ceiling":
            return 10.0
        if self.workload.startswith("mlp"):
            return 17.0 + torch / 2
        if self.workload in ("resnet50", "vit_b"):
            return 35.0 + torch
        large = self.workload == "gpt_1b3"
        steps = {"fp32": self.steps_seconds / 2, "tf32": 25.0}.get(self.precision, 12.0)
        if large:
            steps = {"fp32": self.steps_seconds, "tf32": 40.0}.get(self.precision, 25.0)
        return min(steps, self.steps_seconds) + (40.0 if large else 25.0) + torch


PART_S = 520.0  # of the nine minutes that a part has


def _rows() -> Iterator[Row]:
    """The table, worth first; the driver measures in this order."""
    ours, hand, torch = "jmp_train", "hand-written JAX", "PyTorch"
    small, large = "gpt_124m", "gpt_1b3"

    # The published claim, the rivals in half precision, and the ceiling under them.
    yield from (Row("ceiling", p, ours) for p in ("bf16", "fp32", "tf32", "fp16"))
    yield from (Row(small, p, ours) for p in ("bf16", "fp32", "fp16", "tf32"))
    yield from (Row(small, p, program) for p in ("bf16", "fp16") for program in (hand, torch))

    # The large model, its reference in float32 first, and code that was written in float32.
    yield from (Row(large, p, ours) for p in ("bf16", "fp32"))
    yield from (Row(large, "bf16", program) for program in (hand, torch))
    yield from (Row(small, "bf16", program) for program in ("autocast", "apply_policy"))
    yield from (Row(large, p, ours) for p in ("fp16", "tf32"))
    yield Row("ceiling", "copy", ours)

    yield from _questions()

    # Small steps, where the dispatch counts, and large products without attention.
    for name, precisions in (
        ("mlp_digits", ("bf16", "fp16", "fp32")),
        ("mlp_wide", ("bf16", "fp16", "fp32", "tf32")),
    ):
        for p in precisions:
            yield from (Row(name, p, program) for program in (ours, hand, torch))
        yield from (Row(name, "bf16", program) for program in ("autocast", "apply_policy"))
    for p in ("bf16", "fp16", "fp32"):
        steps = (("steps", "50"),)
        yield from (Row("mlp_digits", p, program, steps) for program in (ours, hand))

    # Images.
    for name in ("resnet50", "vit_b"):
        yield from (Row(name, p, ours) for p in ("bf16", "fp32"))
        yield Row(name, "bf16", torch)
    for name in ("resnet50", "vit_b"):
        yield Row(name, "fp16", ours)
        yield Row(name, "fp16", torch)
        yield Row(name, "tf32", ours)

    # The rest.
    for p in ("tf32", "fp32"):
        yield from (Row(small, p, program) for program in (hand, torch))
    yield Row(small, "fp16", "autocast")
    yield from (Row(large, "bf16", program) for program in ("autocast", "apply_policy"))
    yield from (Row(large, "fp16", program) for program in (hand, torch))
    for p in ("tf32", "fp32"):
        yield from (Row(large, p, program) for program in (hand, torch))


def _questions() -> Iterator[Row]:
    """Each question's rows differ in one option."""
    for question, precision, option, values in (
        ("loss_scale", "fp16", "skip", ("select", "cond", "none")),
        ("attention", "bf16", "attention", ("cudnn", "xla")),
        ("remat", "bf16", "remat", ("none", "dots", "full")),
        ("naming", "fp16", "naming", ("on", "off")),
        ("accumulation", "bf16", "accumulate", ("float32", "bfloat16")),
        (
            "xla_flags",
            "bf16",
            "flags",
            ("none", "latency_hiding", "no_command_buffers", "no_triton_gemm"),
        ),
    ):
        for value in values:
            yield Row("gpt_124m", precision, "jmp_train", ((option, value),), question)


def _in_parts(rows: Iterator[Row]) -> Iterator[Row]:
    """Each row with the number of its part: as many rows as are planned to fit into one."""
    part, planned, workloads = 1, 0.0, set()
    for row in rows:
        seconds = row.planned_s
        if row.workload.startswith("gpt") and row.workload not in workloads:
            seconds += 50.0  # two steps compiled, to find the batch
        workloads.add(row.workload)
        if planned + seconds > PART_S:
            part, planned = part + 1, 0.0
        planned += seconds
        yield dataclasses.replace(row, part=part)


ROWS = tuple(_in_parts(_rows()))
PARTS = ROWS[-1].part


def row(row_id: str) -> Row:
    """The row of an id.

    Raises:
      KeyError: for an id that no row has.
    """
    return {r.id: r for r in ROWS}[row_id]
