"""`jmp-train plan NAME`: what a run needs on a device that is not here."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from jmp_train.cli.options import parse
from jmp_train.cli.positional import take_experiment
from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.find import find_experiment
from jmp_train.errors import UsageError
from jmp_train.plan.fit import fit_report, largest_batches
from jmp_train.plan.plan import find_device, make_plan
from jmp_train.plan.report import report
from jmp_train.types import Json


@dataclasses.dataclass(frozen=True)
class PlanArguments:
    """Compile the step of an experiment for a device that is not here, and print what it needs."""

    experiment: AnyExperiment
    device: str = "h100"
    """Kind of the devices: h100, h200, a100, b200, rtx4090, tpu-v5e, tpu-v5p, tpu-v6e or cpu."""
    fit: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Search for the largest batch that fits, for several meshes and each remat of the model."""
    output: Path | None = None
    """File to write the plan to, or those of --fit, as JSON."""

    def __post_init__(self) -> None:
        try:
            find_device(self.device)
        except UsageError as error:
            raise ValueError(str(error)) from None


def command(arguments: list[str]) -> None:
    """Print the plan, and write it as JSON if it is asked for."""
    name, options = take_experiment(arguments, "plan")
    default = PlanArguments(find_experiment(name))
    parsed = parse(PlanArguments, default, options, f"jmp-train plan {name}")
    folder = Path() if parsed.output is None else parsed.output.parent
    if not folder.is_dir():  # before minutes of compilation
        raise UsageError(f"{parsed.output} cannot be written: {folder} does not exist")
    values: Json | list[Json]
    if parsed.fit:
        show = lambda line: print(line, file=sys.stderr, flush=True)
        fits = largest_batches(name, parsed.experiment, find_device(parsed.device), show)
        print(fit_report(fits))
        values = [
            {"settings": fit.settings, "batch_size": fit.batch_size,
             "plan": None if fit.plan is None else fit.plan.to_json()}
            for fit in fits
        ]  # fmt: skip
    else:
        plan = make_plan(name, parsed.experiment, find_device(parsed.device))
        print(report(plan))
        values = plan.to_json()
    if parsed.output is not None:
        try:
            parsed.output.write_text(json.dumps(values, indent=2), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{parsed.output} cannot be written: {error.strerror}") from None
        print(f"wrote {parsed.output}")
