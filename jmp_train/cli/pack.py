"""`jmp-train pack NAME OUT`: write the data of an experiment into ArrayRecord files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jmp_train.cli.options import parse
from jmp_train.cli.positional import take_experiment, take_positional
from jmp_train.config.find import find_experiment
from jmp_train.data.records import check_new, pack
from jmp_train.errors import UsageError
from jmp_train.reports.stages import stage, terminal_alone


@dataclasses.dataclass(frozen=True)
class PackArguments:
    """Write the data of an experiment into ArrayRecord files, which are read at random from disk."""

    data: Any
    shards: int = 1
    """Number of files for the examples to train on, and for those that are held out."""

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise ValueError(f"shards is {self.shards}; expected at least 1")


def command(arguments: list[str]) -> None:
    """Write the files, and print how many examples they have."""
    name, rest = take_experiment(arguments, "pack")
    what = "a folder to write"
    out, rest = take_positional(rest, f"pack {name} OUT", what, lambda: "such as packed")
    data = find_experiment(name).data
    kind = dataclasses.make_dataclass(
        "PackArguments", [("data", type(data))], bases=(PackArguments,), frozen=True
    )
    kind.__doc__ = PackArguments.__doc__
    parsed = parse(kind, kind(data), rest, f"jmp-train pack {name} {out}")
    try:
        check_new(Path(out))  # before the work
        with stage(terminal_alone(), "loading data"):
            dataset = parsed.data.load()
        with stage(terminal_alone(), "writing"):
            counts = pack(dataset, out, shards=parsed.shards)
    except ValueError as error:
        raise UsageError(str(error)) from None
    print(f"{counts['train']} training examples, {counts['held_out']} held out  {out}")
