"""Patterns for the paths of modules and parameters."""

from __future__ import annotations

import difflib
import functools
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


@functools.lru_cache(maxsize=1024)
def compiled(pattern: str) -> Callable[[str], Any]:
    """Return the function that says whether a pattern matches a whole path.

    Raises:
      ValueError: for an invalid regular expression.
    """
    text = pattern.removeprefix("re:") if pattern.startswith("re:") else _regex_of_glob(pattern)
    try:
        with warnings.catch_warnings(action="ignore"):  # FutureWarning: possible nested set
            return re.compile(text).fullmatch
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"rule pattern {pattern!r} is an invalid regular expression: {error}; expected a glob such "
            "as '**/norm*', or 're:' and a regular expression"
        ) from None


def _regex_of_glob(pattern: str) -> str:
    regex = ""
    parts = pattern.split("/")
    again = [a == b == "**" for a, b in itertools.pairwise(parts)]  # `**/**` equals `**`
    *firsts, last = [part for part, more in zip(parts, [*again, False], strict=True) if not more]
    for part in firsts:
        regex += "(?:[^/]+/)*" if part == "**" else _regex_of_name(part) + "/"
    if last != "**":
        return regex + _regex_of_name(last)
    return regex.removesuffix("/") + "(?:/[^/]+)*" if firsts else ".*"


def _regex_of_name(part: str) -> str:
    pieces = re.split(r"(\*|\?|\[!?[^\]]+\])", part)
    wild = {"*": "[^/]*", "?": "[^/]"}
    return "".join(
        wild.get(p) or (p.replace("[!", "[^") if p.startswith("[") else re.escape(p))
        for p in pieces
        if p
    )


def first_match(patterns: Sequence[str], path: str) -> int | None:
    """Return the index of the first pattern that matches a path, or None.

    >>> first_match(["**/norm*", "**"], "blocks/0/norm1"), first_match(["head"], "heads")
    (0, None)
    """
    return next((i for i, pattern in enumerate(patterns) if compiled(pattern)(path)), None)


def check_matches(patterns: Mapping[str, str], paths: Iterable[str], what: str) -> None:
    """Check that each pattern matches at least one of the paths.

    Args:
      patterns: what is said of each pattern in a message, by pattern.
      paths: the paths.
      what: what a path is that of, such as "module".

    Raises:
      ValueError: if a pattern matches none, with the nearest paths.
    """
    paths = list(paths)
    for pattern, said in patterns.items():
        if not any(map(compiled(pattern), paths)):
            plain = re.sub(r"^re:|\*\*/|[*?^$]", "", pattern)
            near = difflib.get_close_matches(plain, paths, n=3, cutoff=0.3)
            found = ", ".join(repr(path) for path in near or paths[:8])
            raise ValueError(
                f"the rule {pattern!r}{said} matches no {what}; the nearest are {found}"
            )
