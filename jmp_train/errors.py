"""Error messages that state the given value, the expectation and the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return the end of an error message: the nearest valid choice, or all of them if none is near.

    >>> nearest("float17", ["float16", "bfloat16"])
    "did you mean 'float16'?"
    """
    valid = list(valid)
    by_lower = {v.lower(): v for v in reversed(valid)}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.55)
    if close:
        return f"did you mean {by_lower[close[0]]!r}?"
    return "expected one of " + ", ".join(valid)


class UsageError(Exception):
    """Wrong input from the user; the message states what was given, expected and nearest."""


class DataError(UsageError, ValueError):
    """Data that cannot be trained on; the message, one line, names the example or the batch.

    >>> print(DataError("the name of a file may have a new\\nline"))
    the name of a file may have a new\\nline
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))
