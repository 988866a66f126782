"""Rules: which glob matches which path, first match wins, and a rule that matches nothing is told."""

import fnmatch
import glob
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jmp_train as jt
from jmp_train.policy.rules import Rules


@pytest.mark.parametrize(
    "pattern,matching,others",
    [
        ("**", ["", "a", "a/b/c"], []),
        ("head", ["head"], ["", "heads", "head/x", "x/head"]),
        ("head/**", ["head", "head/x", "head/x/y"], ["heads", "x/head"]),
        (
            "**/norm*",
            ["norm", "norm1", "a/norm", "a/b/norm_2"],
            ["a/xnorm", "norm/x", "norm1/scale"],
        ),
        ("blocks/*/attn", ["blocks/0/attn"], ["blocks/attn", "blocks/0/1/attn", "blocks/0/attn/q"]),
        ("blocks/**/attn", ["blocks/attn", "blocks/0/attn", "blocks/0/1/attn"], ["attn"]),
        ("blocks/[01]/?", ["blocks/0/q", "blocks/1/k"], ["blocks/2/q", "blocks/0/qq"]),
        ("blocks/[!0]", ["blocks/1"], ["blocks/0"]),
        ("a.b", ["a.b"], ["axb"]),
        (r"re:.*/(q|k)", ["a/q", "a/b/k"], ["q", "a/v"]),
        ("re:", [""], ["a"]),
    ],
)
def test_what_a_pattern_matches(pattern, matching, others):
    rules = Rules([(pattern, "bf16")])
    assert all(rules.index_of(path) == 0 for path in matching)
    assert all(rules.index_of(path) is None for path in others)


NAMES = st.text("abn01", min_size=1, max_size=3)


@given(
    pattern=st.lists(
        st.sampled_from(["**", "*", "a*", "?", "ab", "[ab]1"]), min_size=1, max_size=4
    ),
    path=st.lists(NAMES, min_size=1, max_size=4),
)
def test_patterns_match_as_a_second_algorithm_says(pattern, path):
    # The oracle: recursion over names, with the standard library's matching of one name.
    def matches(parts, names):
        if not parts:
            return not names
        if parts[0] == "**":
            return any(matches(parts[1:], names[i:]) for i in range(len(names) + 1))
        return (
            bool(names)
            and fnmatch.fnmatchcase(names[0], parts[0])
            and matches(parts[1:], names[1:])
        )

    rules = Rules([("/".join(pattern), "bf16")])
    assert (rules.index_of("/".join(path)) == 0) == matches(pattern, path)


def test_the_first_match_wins_and_the_rest_comes_down_from_the_parent():
    rules = Rules([("a/b", "f16"), ("a", "bf16"), ("a/b/c", "f64")])
    policies = [
        str(rules.policy_of(path).compute_dtype) for path in ("a/b", "a", "a/x", "a/b/y", "")
    ]
    assert policies == ["float16", "bfloat16", "bfloat16", "float16", "float32"]
    assert rules.policy_of("a/b/c") == jt.get_policy("f64")


def test_rules_come_from_pairs_strings_a_policy_or_rules():
    pairs = Rules([("**/norm*", "float32"), ("**", "c=bf16,o=f32")])
    assert Rules(["**/norm*=float32", "**=c=bf16,o=f32"]) == pairs
    assert Rules(pairs) == pairs and hash(Rules(pairs)) == hash(pairs)
    assert Rules("bf16") == Rules(jt.get_policy("bf16")) == Rules([("**", "bf16")])
    assert Rules([(r.pattern, str(r.policy)) for r in pairs.entries]) == pairs


@pytest.mark.parametrize(
    "entries,message",
    [
        (["head"], "has no policy; write it as 'pattern=policy'"),
        ([("head", "c=float17")], "did you mean 'float16'"),
        ([("re:(", "bf16")], "'re:\\(' is an invalid regular expression"),
        ([("", "bf16")], "expected a glob"),
    ],
)
def test_invalid_rules_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        Rules(entries)


MODULES = {"": "Net", "blocks/0": "Block", "blocks/0/norm1": "LayerNorm", "head": "Linear"}


def test_a_report_says_which_rule_took_which_module():
    report = Rules([("**/norm*", "float32"), ("blocks/**", "bf16")]).explain(MODULES)
    assert [(row.path, row.rule) for row in report.rows] == [
        ("", None), ("blocks/0", "blocks/**"), ("blocks/0/norm1", "**/norm*"), ("head", None),
    ]  # fmt: skip
    lines = str(report).splitlines()
    assert len({line.index("p=") for line in lines[1:]}) == 1
    assert lines[1].startswith("(model)") and lines[-1].endswith("(its parent's)")


def test_a_rule_that_matches_no_module_is_an_error_with_the_nearest_paths():
    with pytest.raises(ValueError, match=r"'haed' .* matches no module; the nearest are 'head'"):
        Rules([("haed", "float32"), ("**", "bf16")]).explain(MODULES)
    with pytest.raises(ValueError, match="nearest are .*'blocks/0/norm1'"):
        Rules([("**/nrom1", "float32")]).check(MODULES)


def test_globs_are_written_as_in_the_standard_library(tmp_path):
    for path in ("a/norm", "a/b/norm", "norm", "a/other"):
        folder = tmp_path / path
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.touch()
    found = {re.sub(r"\\", "/", p) for p in glob.glob("**/norm", root_dir=tmp_path, recursive=True)}
    rules = Rules([("**/norm", "bf16")])
    assert {p for p in ("a/norm", "a/b/norm", "norm", "a/other") if rules.index_of(p) == 0} == found
