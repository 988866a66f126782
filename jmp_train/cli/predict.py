"""`jmp-train predict RUN_DIR`: continue a text with a run of a language model."""

from __future__ import annotations

import dataclasses
import sys
import unicodedata

from jmp_train.cli.compilation_cache import keep_compiled
from jmp_train.cli.options import parse
from jmp_train.cli.positional import choose_run, take_run
from jmp_train.reports.stages import terminal_alone
from jmp_train.runs.predict import predict_run


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """Continue a text with the newest checkpoint of a run."""

    prompt: str = "The "
    """Text to continue."""
    length: int = 200
    """Number of bytes to add."""
    temperature: float = 0.8
    """Divisor of the logits: 0 takes the likeliest byte, 1 draws bytes by their probability."""
    seed: int = 0
    """Random seed of the draws."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt is empty; expected at least one byte")
        if self.length < 1:
            raise ValueError(f"length is {self.length}; expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; expected a number of 0 or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; expected 0 to {2**32 - 1}")


def command(arguments: list[str]) -> None:
    """Continue a text, and print it with its continuation."""
    given, rest = take_run(arguments, "predict")
    options = parse(PredictOptions, PredictOptions(), rest, f"jmp-train predict {given}")
    prompt = options.prompt.encode("utf-8", "surrogateescape")  # the bytes that the shell gave
    run_dir = choose_run(given)
    experiment = stored_experiment(run_dir)
    keep_compiled()
    continuation = predict_run(
        run_dir,
        experiment,
        prompt,
        length=options.length,
        temperature=options.temperature,
        seed=options.seed,
        console=terminal_alone(),
    )
    print(printable(prompt + continuation, sys.stdout.encoding))


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
