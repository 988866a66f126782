"""Options of the command line, read into dataclasses; an error becomes one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import typing
from typing import Any

import tyro

from jmp_train.cli.help import SHORT, registry
from jmp_train.cli.messages import one_line
from jmp_train.config.experiment import AnyExperiment, Experiment
from jmp_train.config.warmup import fit_warmup
from jmp_train.errors import UsageError
from jmp_train.fields import fits


def parse(
    kind: Any, default: Any, arguments: list[str], prog: str, *, known_only: bool = False
) -> Any:
    """Read options into a dataclass.

    Args:
      kind: an experiment, a dataclass that has a field `experiment`, or another dataclass.
      default: the values of options that are not given.
      arguments: the options and their values.
      prog: the command, for its help.
      known_only: return the arguments that `kind` does not take as a second result.

    Raises:
      UsageError: in one line, for an unknown option with the nearest valid one; for a value that
        its option does not take.
    """
    arguments = [_full_name(argument) for argument in arguments]
    experiment = getattr(default, "experiment", default)
    if isinstance(experiment, Experiment):
        _refuse_group(arguments, experiment)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(
                kind,
                default=default,
                args=arguments,
                prog=prog,
                return_unknown_args=known_only,
                registry=registry,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(one_line(complaint.getvalue())) from None
    except ValueError as error:  # an experiment's own check of its values
        raise UsageError(str(error)) from None
    parsed_experiment = getattr(parsed, "experiment", parsed)
    if isinstance(parsed_experiment, Experiment):
        _refuse_long_warmup(arguments, parsed_experiment)
    return parsed


def _full_name(argument: str) -> str:
    """Return an argument with a short option written out in full."""
    option, equals, value = argument.partition("=")
    return SHORT.get(option, option) + equals + value


def _refuse_group(arguments: list[str], experiment: AnyExperiment) -> None:
    """Refuse `--optimizer adam`: tyro's nearest options to a group are those of an equal spelling."""
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        option, equals, value = argument.partition("=")
        option = option.replace("_", "-")
        group = getattr(experiment, option.removeprefix("--").replace("-", "_"), None)
        if not option.startswith("--") or not dataclasses.is_dataclass(group):
            continue
        if option == "--task":
            raise UsageError("--task is not an option; expected the task in the experiment's file")
        if not equals:
            value = "" if following.startswith("--") else following
        hint = f"{option}.{_suggest(group, value)}"
        raise UsageError(f"{option} is a group of options; did you mean {hint}?")


def _suggest(group: Any, value: str) -> str:
    """Return the first field of a configuration that takes a value, with it, else its first field."""
    kinds = typing.get_type_hints(type(group))
    names = [field.name for field in dataclasses.fields(group)]
    meant: Any = value
    for number in (float, int):
        with contextlib.suppress(ValueError):
            meant = number(value)
    takers = (n for n in names if fits(meant, kinds[n]) or fits((meant,), kinds[n]))
    taker = next(takers, None) if value else None
    return names[0].replace("_", "-") if taker is None else f"{taker.replace('_', '-')} {value}"


def _refuse_long_warmup(arguments: list[str], experiment: AnyExperiment) -> None:
    """Refuse a given warm-up that does not fit; `fit_warmup` scales any other."""
    flag = "--optimizer.warmup-steps"
    given = any(part.partition("=")[0].replace("_", "-") == flag for part in arguments)
    fitted, _ = fit_warmup(experiment)
    if given and fitted != experiment:
        raise UsageError(
            f"{flag} is {experiment.optimizer.warmup_steps}; expected fewer than --steps "
            f"({experiment.steps}), such as {flag} {fitted.optimizer.warmup_steps}"
        )
