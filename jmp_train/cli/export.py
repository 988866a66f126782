"""`jmp-train export RUN_DIR`: a run for other software."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jmp_train.cli.compilation_cache import keep_compiled
from jmp_train.cli.options import parse
from jmp_train.cli.positional import choose_run, take_run
from jmp_train.reports.stages import stage, terminal_alone
from jmp_train.results.export import check_export, export_run
from jmp_train.results.load import load_run


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Write a run for other software: its parameters, or its network as a program."""

    format: Literal["safetensors", "stablehlo"] = "safetensors"
    """safetensors: the parameters and the model state by name; stablehlo: the function of `predict`, with
    its parameters, for any batch size."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the parameters in safetensors; None: as they are stored. The model state is never cast."""
    output: Annotated[
        Path | None, tyro.conf.arg(help_behavior_hint="(default: RUN_DIR/export)")
    ] = None
    """Folder to write to; or a file with the ending .safetensors or .stablehlo."""
    checkpoint: str = "best"
    """Checkpoint to use: best, by the metric of the experiment; latest; or its step."""
    policy: str | None = None
    """Precision policy of the program; None: that of the run."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write over existing files."""

    def __post_init__(self) -> None:
        if self.format == "stablehlo" and self.dtype is not None:
            raise ValueError(
                f"--dtype {self.dtype} is for safetensors; expected --policy, which decides the dtypes of "
                "a program"
            )
        if self.format == "safetensors" and self.policy is not None:
            raise ValueError(
                f"--policy {self.policy} is for stablehlo; expected --dtype, which decides the dtypes of "
                "safetensors"
            )


def command(arguments: list[str]) -> None:
    """Export a run, and print the files."""
    given, rest = take_run(arguments, "export")
    options = parse(ExportOptions, ExportOptions(), rest, f"jmp-train export {given}")
    run_dir = choose_run(given)
    output = options.output or run_dir / "export"
    check_export(options.format, output, force=options.force)  # before the work
    keep_compiled()
    console = terminal_alone()
    with stage(console, "restoring a checkpoint"):
        run = load_run(run_dir, options.checkpoint, policy=options.policy)
    with stage(console, "exporting"):
        files = export_run(run, options.format, output, dtype=options.dtype, force=options.force)
    for file in files:
        print(file)
