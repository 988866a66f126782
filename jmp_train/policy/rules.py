"""Rules that assign policies to modules by their paths; the first match wins."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jmp_train.policy.patterns import check_matches, compiled, first_match
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
            compiled(rule.pattern)

    def index_of(self, path: str) -> int | None:
        """Return the index of the first rule that matches a path, or None."""
        return first_match([rule.pattern for rule in self.entries], path)

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
        check_matches({rule.pattern: f" ({rule.policy})" for rule in self.entries}, paths, "module")

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


def _table(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return "\n".join(padded)
