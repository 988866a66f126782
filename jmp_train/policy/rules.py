"""Rules that assign policies to modules by their paths; the first match wins."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jmp_train.policy.policy import Policy, get_policy

_FLOAT32 = Policy(np.float32, np.float32, np.float32)


class Rule(NamedTuple):
    """A pattern for module paths, and the policy of the modules that it matches."""

    pattern: str
    policy: Policy


@dataclasses.dataclass(frozen=True)
class Rules:
    """Ordered (pattern, policy) pairs; the first pattern that matches a module sets its policy.

    The path of a module joins attribute names with `/`, for example `blocks/0/attention/query`; the
    path of the model itself is `""`. A pattern is a glob for the whole path. `*`, `?` and `[abc]`
    match within one name. `**` matches any number of names, including none: `**` alone matches
    every module, `**/norm*` a norm at any depth, `head/**` the head and all modules inside it. A
    pattern that starts with `re:` is a regular expression for the whole path. A module that no rule
    matches has the policy of its parent; the model itself is then float32.

    Attributes:
      entries: the pairs. Each is given as `(pattern, policy)`, where the policy is a `Policy` or a
        string for `get_policy`, or as one string `"pattern=policy"`.

    Frozen and hashable, so static under jit; `str()` returns a table.

    Raises:
      ValueError: for an unknown policy, an invalid regular expression, or a string without `=`.

    >>> rules = Rules([("**/norm*", "float32"), ("head", "c=float32"), ("**", "mixed_bfloat16")])
    >>> rules.policy_of("blocks/0/norm1") == get_policy("float32")
    True
    >>> print(rules)
    pattern   policy
    **/norm*  p=full,c=full,o=full
    head      p=full,c=full,o=full
    **        p=full,c=bf16,o=full
    """

    entries: tuple[Rule, ...]

    def __init__(self, entries: str | Policy | Iterable[Any] | Rules):
        if isinstance(entries, Rules):
            entries = entries.entries
        if isinstance(entries, (str, Policy)):  # one policy for all
            entries = [("**", entries)]
        object.__setattr__(self, "entries", tuple(_rule(entry) for entry in entries))
        for rule in self.entries:
            _compiled(rule.pattern)

    def index_of(self, path: str) -> int | None:
        """Return the index of the first rule that matches a path, or None."""
        return next((i for i, r in enumerate(self.entries) if _compiled(r.pattern)(path)), None)

    def policy_of(self, path: str) -> Policy:
        """Return the policy of the module at a path: its rule's, else its nearest ancestor's."""
        index = self.index_of(path)
        if index is not None:
            return self.entries[index].policy
        return self.policy_of(path.rpartition("/")[0]) if path else _FLOAT32

    def explain(self, modules: Mapping[str, str]) -> RulesReport:
        """Report the policy and the rule of each module.

        Args:
          modules: name of the type of each module, by path.

        Raises:
          ValueError: if a rule matches no module, with the nearest paths.
        """
        self.check(modules)
        rows = []
        for path, kind in modules.items():
            index = self.index_of(path)
            pattern = None if index is None else self.entries[index].pattern
            rows.append(RuleRow(path, kind, self.policy_of(path), pattern))
        return RulesReport(tuple(rows))

    def check(self, paths: Iterable[str]) -> None:
        """Check that each rule matches at least one of the paths.

        Raises:
          ValueError: if a rule matches none, with the rule and the nearest paths.
        """
        paths = list(paths)
        for pattern, policy in self.entries:
            if not any(map(_compiled(pattern), paths)):
                plain = re.sub(r"^re:|\*\*/|[*?^$]", "", pattern)
                near = difflib.get_close_matches(plain, paths, n=3, cutoff=0.3)
                found = ", ".join(repr(path) for path in near or paths[:8])
                raise ValueError(
                    f"the rule {pattern!r} ({policy}) matches no module; the nearest are {found}"
                )

    def __str__(self) -> str:
        return _table([("pattern", "policy"), *((r.pattern, str(r.policy)) for r in self.entries)])


NO_RULES = Rules(())


class RuleRow(NamedTuple):
    """One module of a report."""

    path: str  # "" for the model itself
    module: str  # name of its type
    policy: Policy
    rule: str | None  # the pattern that matched; None if the policy is the parent's


@dataclasses.dataclass(frozen=True)
class RulesReport:
    """Policy and rule of each module: `rows` as data, `str()` as a table."""

    rows: tuple[RuleRow, ...]

    def __str__(self) -> str:
        lines = [("path", "module", "policy", "rule")]
        for row in self.rows:
            rule = "(its parent's)" if row.rule is None else row.rule
            lines.append((row.path or "(model)", row.module, str(row.policy), rule))
        return _table(lines)


def _rule(entry: Any) -> Rule:
    if isinstance(entry, str):
        pattern, equals, policy = entry.partition("=")
        if not equals:
            raise ValueError(f"rule {entry!r} has no policy; write it as 'pattern=policy'")
        entry = (pattern.strip(), policy)
    pattern, policy = entry
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"rule pattern {pattern!r}; expected a glob such as '**/norm*'")
    return Rule(pattern, get_policy(policy))


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
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


def _table(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return "\n".join(padded)
