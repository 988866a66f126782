"""The report's advice: options that suit what was found, and the experiment."""

import dataclasses
import types

import pytest

from jmp_train.config.find import find_experiment
from jmp_train.debug import NonFiniteOp, NonFiniteReport
from jmp_train.policy.rules import Rules
from jmp_train.reports.advice import advise
from jmp_train.reports.divergence import Float32Gradients

FINE = Float32Gradients(2.3, True, 0.05, 10, "float16", {}, {}, {})


def overflow(module="params/layers/2/kernel", **fields):
    op = NonFiniteOp(
        "dot_general", "overflow", "float16", (2, 3), 1, False, module, "", "net.py:3 (call)", (), 1e5, ()
    )  # fmt: skip
    return NonFiniteReport(("loss",), (), (dataclasses.replace(op, **fields),))


def words(operations, float32=FINE, *, skips=True, accepted=True, **fields):
    experiment = dataclasses.replace(find_experiment("mlp_fp16"), **fields)
    tips = advise(
        experiment=experiment, operations=operations, float32=float32, skips=skips,
        loss_scale=1024.0, accepts=lambda rules: accepted and bool(Rules(rules)),
    )  # fmt: skip
    return [said for _, said in tips]


def test_an_overflow_in_the_forward_pass_calls_for_float32_there():
    assert words(overflow()) == [
        "--rules layers/2=float32 '**=mixed_float16'",
        "--policy mixed_bfloat16",
        "--optimizer.learning-rate 0.0002",
    ]


def test_the_runs_own_rules_are_kept_behind_the_new_one():
    said = words(overflow(), rules=("layers/0=f16", "**=mixed_float16"))
    assert said[:2] == [
        "--rules layers/2=float32 layers/0=f16 '**=mixed_float16'",
        "--rules layers/0=bfloat16 '**=mixed_bfloat16'",
    ]


@pytest.mark.parametrize("module", ["", "w", "params/w", "Mlp/Dense_1"])
def test_a_module_that_no_path_names_gets_no_rule(module):
    assert not any("--rules" in said for said in words(overflow(module)))


def test_a_rule_that_the_model_would_refuse_is_not_advised():
    assert not any("--rules" in said for said in words(overflow(), accepted=False))


def test_what_float32_does_not_mend_gets_no_advice_on_formats():
    broken = dataclasses.replace(FINE, finite=False)
    assert words(overflow(), broken) == ["--optimizer.learning-rate 0.0002"]
    assert words(None, None, skips=False)[0] == "--nonfinite skip"


def test_a_static_scale_is_lowered_to_what_fits():
    static = types.SimpleNamespace(kind="static")
    said = words(overflow(backward=True, wide=2.0**20), loss_scale=static)
    # 2^20 at a scale of 1,024 is 2^10 without; 2^10 * 16 is half of 65,504's neighbour, 2^15.
    assert said[0] == "--loss-scale.kind dynamic --loss-scale.initial 16"
    assert not any("--rules" in word for word in said)


def test_data_that_is_not_finite_comes_first():
    report = NonFiniteReport(("loss",), ("batch/image",), ())
    assert words(report)[0] == "(look at the data)"
