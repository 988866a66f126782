"""`jmp-train compare FAMILY`: train one family in several precisions and seeds, and compare."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from jmp_train.cli.compilation_cache import keep_compiled
from jmp_train.cli.options import parse
from jmp_train.cli.positional import take_positional
from jmp_train.cli.resume_command import tell_how_to_resume
from jmp_train.config.experiment import AnyExperiment, Experiment
from jmp_train.errors import UsageError
from jmp_train.runs.compare import compare, families, variants_of
from jmp_train.runs.folders import results_folder


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Train one family in several precisions and seeds, and compare."""

    precisions: str = "fp32,fp16,bf16"
    """Experiments of the family, by precision; @highest after one sets its matmul precision."""
    seeds: int = 5
    """Number of runs of each experiment, with the seeds 0 to N - 1."""
    out: Annotated[
        Path | None, tyro.conf.arg(help_behavior_hint="(default: runs/compare/FAMILY/TIME)")
    ] = None
    """Folder of the results."""
    compilation_cache: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Keep compiled programs in the user's cache folder, so that the next run starts sooner."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}; expected at least 1")


@dataclasses.dataclass(frozen=True)
class CompareArguments(CompareOptions):
    """Train one family in several precisions and seeds, and compare."""

    experiment: AnyExperiment = dataclasses.field(kw_only=True)


def command(arguments: list[str]) -> None:
    """Compare the precisions of a family."""
    form, what = "compare FAMILY", "the name of a family"
    family, rest = take_positional(
        arguments, form, what, lambda: f"families are {', '.join(families())}"
    )
    prog = f"jmp-train compare {family}"
    if {"-h", "--help"} & set(rest):
        first = next(iter(variants_of(family, CompareOptions.precisions).values()))
        parse(CompareArguments, CompareArguments(experiment=first), rest, prog)
    options, fields = parse(CompareOptions, CompareOptions(), rest, prog, known_only=True)
    variants = {}
    for label, default in variants_of(family, options.precisions).items():
        variants[label] = parse(Experiment, default, fields, prog)
        for field in ("policy", "seed"):
            if getattr(variants[label], field) != getattr(default, field):
                raise UsageError(f"compare sets --{field} itself; expected no --{field}")
    if options.compilation_cache:
        keep_compiled()
    with results_folder(options.out, Path("runs") / "compare" / family) as out:
        folder = ["--out", str(out)] if options.out is None else []
        with tell_how_to_resume(["compare", *arguments], folder):
            compare(family, variants, seeds=options.seeds, out=out, console=Console())
