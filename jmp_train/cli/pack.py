"""`jmp-train pack NAME OUT`: write the data of an experiment into ArrayRecord files."""

from __future__ import annotations

import dataclasses
from typing import Any

from jmp_train.cli.options import parse
from jmp_train.cli.positional import take_experiment, take_positional
from jmp_train.config.find import find_experiment
from jmp_train.data.pack import pack
from jmp_train.errors import UsageError
from jmp_train.reports.stages import stage, terminal_alone
from jmp_train.runs.signals import exit_on_sigterm
from jmp_train.sources.files import named
from jmp_train.whole_folder import check_new


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
    asks = bool({"-h", "--help"} & set(rest[:1]))  # for the options, which depend on NAME
    rest = ["OUT", *rest] if asks else rest
    out, rest = take_positional(rest, f"pack {name} OUT", what, lambda: "such as packed")
    data = find_experiment(name).data
    kind = dataclasses.make_dataclass(
        "PackArguments", [("data", type(data))], bases=(PackArguments,), frozen=True
    )
    kind.__doc__ = PackArguments.__doc__
    parsed = parse(kind, kind(data), rest, f"jmp-train pack {name} {out}")
    check_new(named(out))  # before the work
    try:
        with stage(terminal_alone(), "loading data"):
            dataset = parsed.data.load()
        with stage(terminal_alone(), "writing"), exit_on_sigterm():
            counts = pack(dataset, out, shards=parsed.shards)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None
    print(f"{counts['train']} training examples, {counts['held_out']} held out  {out}")
