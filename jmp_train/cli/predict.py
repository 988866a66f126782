"""`jmp-train predict RUN_DIR [INPUT]`: predictions of a run, or a text that it continues."""

from __future__ import annotations

import dataclasses
import os
import sys
import unicodedata
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console

from jmp_train.cli.compilation_cache import keep_compiled
from jmp_train.cli.options import parse
from jmp_train.cli.positional import choose_run, take_run
from jmp_train.data.data import own_of
from jmp_train.errors import UsageError
from jmp_train.reports.predictions import predictions_table
from jmp_train.reports.stages import stage, terminal_alone
from jmp_train.results.load import Run, load_run
from jmp_train.results.outputs import check_ending, check_free, whole_files, write_predictions
from jmp_train.results.read_inputs import read_inputs
from jmp_train.sources.files import check_file

_LARGEST_PROMPT = 2**20  # bytes
_ARRAYS = (".npz", ".npy")


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """Predict on examples with a run, or continue a text."""

    input: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="INPUT")] = None
    """A .npz or .npy file, or a folder of .npy files or images; for a language model a text file, or -
    for standard input."""
    output: Path | None = None
    """File to write all predictions to: .npz, .csv, .json or .jsonl; .txt for a text."""
    checkpoint: str = "best"
    """Checkpoint to use: best, by the metric of the experiment; latest; or its step."""
    policy: str | None = None
    """Precision policy to compute in; None: that of the run."""
    batch_size: int | None = None
    """Number of examples in a batch; None: that of the run."""
    prompt: str | None = None
    """Text to continue with a language model; None: INPUT, or else "The "."""
    length: int = 200
    """Number of tokens to add to a text: bytes, unless the run has a tokenizer."""
    temperature: float = 0.8
    """Divisor of the logits: 0 takes the likeliest token, 1 draws tokens by their probability."""
    seed: int = 0
    """Random seed of the draws."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write over an existing output file."""

    def __post_init__(self) -> None:
        if self.prompt == "":
            raise ValueError("prompt is empty; expected at least one byte")
        if self.prompt is not None and self.input is not None:
            raise ValueError("--prompt and an input file were given; expected one of the two")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 1")
        if self.length < 1:
            raise ValueError(f"length is {self.length}; expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; expected a number of 0 or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; expected 0 to {2**32 - 1}")


def command(arguments: list[str]) -> None:
    """Predict on examples and print the first, or continue a text and print it."""
    given, rest = take_run(arguments, "predict")
    options = parse(PredictOptions, PredictOptions(), rest, f"jmp-train predict {given}")
    run_dir = choose_run(given)
    _check_input(options.input)
    keep_compiled()
    console = terminal_alone()
    with stage(console, "restoring a checkpoint"):
        run = load_run(run_dir, options.checkpoint, policy=options.policy)
    arrays = options.input is not None and options.input != "-" and not _is_text(options.input)
    if arrays:
        _predict(run, options, console)
    else:
        _generate(run, options, console)


def _check_input(given: str | None) -> None:
    """Raise UsageError for a path that does not exist, before a checkpoint is restored."""
    if given is None or given == "-" or os.path.isdir(given):
        return
    path = Path(given)
    try:
        check_file(path, "text" if _is_text(given) else path.suffix)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _is_text(given: str) -> bool:
    path = Path(given)
    return path.suffix.lower() not in _ARRAYS and not path.is_dir()


def _predict(run: Run, options: PredictOptions, console: Console) -> None:
    """Print the first predictions, and write all of them."""
    assert options.input is not None
    if options.output is not None:  # before the work
        check_ending(options.output)
        check_free([options.output], force=options.force)
    try:
        data = own_of(run.experiment.data)
        inputs = read_inputs(
            Path(options.input),
            run.inputs,
            run.spec,
            transformed=getattr(data, "transformed", None) is not None,
            image_reader=getattr(data, "image_reader", None),
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    if inputs.scaled:
        line = f"{options.input}: uint8 was divided by 255, for the run was trained on floating numbers"
        print(line, file=sys.stderr)
    with stage(console, "predicting"):
        predictions = run.predict(inputs.arrays, batch_size=options.batch_size)
    predictions = _with_class_names(predictions, run.spec.class_names)
    count = len(next(iter(predictions.values())))
    Console().print(predictions_table(predictions, inputs.files))
    print(f"{count} example{'' if count == 1 else 's'}, step {run.step}  {run.directory}")
    if options.output is not None:
        write_predictions(options.output, predictions, inputs.files, force=options.force)
        print(options.output)


def _with_class_names(
    predictions: dict[str, np.ndarray], names: tuple[str, ...] | None
) -> dict[str, np.ndarray]:
    """Return predictions with `class_name` after `class`, if the data name their classes."""
    classes = predictions.get("class")
    if names is None or classes is None or classes.ndim != 1:
        return predictions
    named: dict[str, np.ndarray] = {}
    for name, array in predictions.items():
        named[name] = array
        if name == "class":
            named["class_name"] = np.array(names)[array]
    return named


def _generate(run: Run, options: PredictOptions, console: Console) -> None:
    """Print a text with its continuation, and write it."""
    if run.functions.generate is None:
        data = getattr(own_of(run.experiment.data), "name", "its data")
        raise UsageError(
            f"{run.directory} holds a run on {data}, whose model does not continue texts; expected "
            f"INPUT: a .npz or .npy file, or a folder, with {' and '.join(run.inputs)}"
        )
    output = options.output
    if output is not None:
        if output.suffix != ".txt":
            raise UsageError(
                f"the output is {str(output)!r}; expected '.txt' as the ending of a text"
            )
        check_free([output], force=options.force)
    prompt = _prompt(options)
    with stage(console, "generating"):
        added = run.generate(
            prompt, options.length, temperature=options.temperature, seed=options.seed
        )
    print(printable(prompt + added, sys.stdout.encoding))
    if output is not None:
        with whole_files([output], force=options.force) as (partial,):
            partial.write_bytes(prompt + added)


def _prompt(options: PredictOptions) -> bytes:
    """Return the bytes to continue: of the option, as the shell gave them, of a file or the input."""
    if options.input is None:
        text = "The " if options.prompt is None else options.prompt
        return text.encode("utf-8", "surrogateescape")
    try:
        if options.input == "-":
            prompt = sys.stdin.buffer.read(_LARGEST_PROMPT + 1)
        else:
            with Path(options.input).open("rb") as file:
                prompt = file.read(_LARGEST_PROMPT + 1)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"{options.input} cannot be read: {error.strerror}") from None
    if not prompt:
        raise UsageError(f"{options.input} is empty; expected at least one byte")
    if len(prompt) > _LARGEST_PROMPT:
        raise UsageError(f"{options.input} is a text of over 1 MiB; expected a shorter one")
    return prompt


def printable(text: bytes, encoding: str) -> str:
    r"""Return bytes as text that is safe to print.

    Escaped are bytes that are not UTF-8, characters that the encoding lacks, characters that turn the
    direction of the text, and control characters other than a new line or a tab.

    >>> print(printable(b"caf\xc3\xa9 \xff \x1b[31m", "ascii"))
    caf\xe9 \xff \x1b[31m
    """
    decoded = text.decode("utf-8", "backslashreplace")
    shown = "".join(ascii(c)[1:-1] if c not in "\n\t" and _controls(c) else c for c in decoded)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _controls(c: str) -> bool:
    """Return whether a character acts on the terminal, or on the order of the characters around it.

    The latter are U+202A to U+202E and U+2066 to U+2069 (Unicode Standard Annex 9, section 2).
    """
    turns = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return unicodedata.category(c) == "Cc" or unicodedata.bidirectional(c) in turns
