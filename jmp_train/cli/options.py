"""Options of the command line, read into dataclasses; what is off becomes one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
import typing
from typing import Annotated, Any

import tyro

from jmp_train.config.experiment import Experiment
from jmp_train.config.warmup import fit_warmup
from jmp_train.errors import UsageError, nearest
from jmp_train.fields import fits

# Not an alias of tyro, which would have to stand in optim/ and be imported with the library.
_SHORT = {"--lr": "--optimizer.learning-rate"}


def typed(experiment: Experiment[Any, Any]) -> Any:
    """The experiment's type with its own model and data, whose fields become options."""
    kind = Experiment[type(experiment.model), type(experiment.data)]
    return Annotated[kind, tyro.conf.FlagConversionOff]


def parse(kind: Any, default: Any, words: list[str], prog: str, *, known_only: bool = False) -> Any:
    """Read options into a dataclass.

    Args:
      kind: the dataclass: an experiment (`typed`), one that has a field `experiment`, or another.
      default: its values where no option is given.
      words: the options and their values.
      prog: what the help calls the command.
      known_only: return the words that are no options of `kind` beside the result.

    Raises:
      UsageError: in one line, for an unknown option with the nearest valid one; for a value that
        its option does not take.
    """
    words = [_full_name(word) for word in words]
    experiment = getattr(default, "experiment", default)
    if isinstance(experiment, Experiment):
        _refuse_group(words, experiment)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(
                kind, default=default, args=words, prog=prog, return_unknown_args=known_only
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(one_line(complaint.getvalue())) from None
    except ValueError as error:  # an experiment's own check of its values
        raise UsageError(str(error)) from None
    parsed_experiment = getattr(parsed, "experiment", parsed)
    if isinstance(parsed_experiment, Experiment):
        _refuse_long_warmup(words, parsed_experiment)
    return parsed


def _full_name(word: str) -> str:
    """A word with its short option, if it is one, written out."""
    option, equals, value = word.partition("=")
    return _SHORT.get(option, option) + equals + value


def _refuse_group(words: list[str], experiment: Experiment[Any, Any]) -> None:
    """Refuse `--optimizer adam`: tyro's nearest options to a group are those of an equal spelling."""
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        option = option.replace("_", "-")
        group = getattr(experiment, option.removeprefix("--").replace("-", "_"), None)
        if not option.startswith("--") or not dataclasses.is_dataclass(group):
            continue
        if not equals:
            value = "" if following.startswith("--") else following
        hint = f"{option}.{_suggest(group, value)}"
        raise UsageError(f"{option} is a group of options; did you mean {hint}?")


def _suggest(group: Any, value: str) -> str:
    """The first field of a configuration that takes a value, with it, else its first field."""
    kinds = typing.get_type_hints(type(group))
    names = [field.name for field in dataclasses.fields(group)]
    meant: Any = value
    for number in (float, int):
        with contextlib.suppress(ValueError):
            meant = number(value)
    takers = (n for n in names if fits(meant, kinds[n]) or fits((meant,), kinds[n]))
    taker = next(takers, None) if value else None
    return names[0].replace("_", "-") if taker is None else f"{taker.replace('_', '-')} {value}"


def _refuse_long_warmup(words: list[str], experiment: Experiment[Any, Any]) -> None:
    """Refuse a warm-up that was asked for and does not fit; `fit_warmup` scales any other."""
    flag = "--optimizer.warmup-steps"
    given = any(word.partition("=")[0].replace("_", "-") == flag for word in words)
    fitted, _ = fit_warmup(experiment)
    if given and fitted != experiment:
        raise UsageError(
            f"{flag} is {experiment.optimizer.warmup_steps}; expected fewer than --steps "
            f"({experiment.steps}), such as {flag} {fitted.optimizer.warmup_steps}"
        )


_PLAIN_WORDS = {
    r"^Error parsing (experiment\.)?(--)?": "--",
    r"^--\w+Options: ": "",
    r"invalid literal for int\(\) with base 10: (.*)": r"expected an integer, got \1",
    r"could not convert string to float: (.*)": r"expected a number, got \1",
    r"no type matching \{None\}\|INT could be instantiated from \[(.*)\]\.": (
        r"expected an integer or None, got \1"
    ),
    r"no type matching \{None\}\|FLOAT could be instantiated from \[(.*)\]\.": (
        r"expected a number or None, got \1"
    ),
    r"Could not find valid parse for arguments: \[(.*)\]": r"expected numbers, got \1",
    r"^Missing value for argument '(\S+)'.*": r"\1: expected a value",
    r"^--[A-Z]\w*: ": "",  # the class of all fields
}


def one_line(complaint: str) -> str:
    """Tyro's framed message in one line: what is off, then the nearest option.

    >>> one_line("╭─ Unrecognized options ─╮\\n│ Unrecognized options: --rate, 1 │\\n│ ──── │\\n"
    ...          "│ Perhaps you meant: │\\n│     --learning-rate FLOAT │\\n╰───╯")
    'Unrecognized options: --rate, 1; did you mean --learning-rate?'
    """
    sections: list[list[str]] = [[]]
    for row in complaint.splitlines():
        text = row.strip("│ ")
        if set(text) <= set("╭╮╰╯─-") or text.startswith("╭"):  # a rule, or the frame
            sections.append([])
        else:
            sections[-1].append(text)
    if "╭" not in complaint:  # without a frame, which ASCII lacks, the title is a section
        sections = sections[1:]
    first, *rest = [section for section in sections if any(section)]
    message = " ".join(first).strip()
    options = [row.split()[0] for section in rest for row in section if row.startswith("--")]
    for pattern, words in _PLAIN_WORDS.items():
        message = re.sub(pattern, words, message)
    if message.startswith("Unrecognized options") and options:
        return f"{message}; did you mean {options[0]}?"
    if message.startswith("Unrecognized options"):
        return f"{message}; expected --FIELD VALUE, as --help shows them"
    choice = re.fullmatch(
        r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of (.*)\.", message
    )
    if choice:
        given, option, valid = choice.groups()
        hint = nearest(given, re.findall(r"'([^']*)'", valid))
        return f"{option} is {given!r}; {hint}"
    return message
