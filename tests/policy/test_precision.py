"""A precision: what users write, parsed once, with its casts and its loss scale."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jmp_train as jt
from jmp_train.flax import apply_policy

HALF_RULES = [("**/norm*", "float32"), ("**", "mixed_float16")]


@pytest.mark.parametrize(
    "given", ["mixed_float16", jt.get_policy("mixed_float16"), jt.get_precision("mixed_float16")]
)
def test_a_string_a_policy_and_a_precision_are_one_value(given):
    assert jt.get_precision(given) == jt.Precision(jt.get_policy("c=f16,o=f32"))
    assert hash(jt.get_precision(given)) == hash(jt.get_precision("mixed_float16"))


def test_rules_replace_the_policy_and_leave_arrays_alone():
    tree = {"w": jnp.ones(2), "h": jnp.ones(2, jnp.bfloat16)}
    for precision in (jt.get_precision(jt.Rules(HALF_RULES)), jt.get_precision("bf16", HALF_RULES)):
        assert precision.cast_to_param(tree) is tree
        assert precision.cast_to_compute(tree) is tree
        assert precision.model == jt.get_policy("mixed_float16")
        assert set(precision.policies) == {jt.get_policy("float32"), jt.get_policy("mixed_float16")}


def test_no_policy_casts_nothing_and_needs_no_loss_scale():
    precision = jt.get_precision(None)
    tree = {"w": jnp.ones(2)}
    assert precision.cast_to_compute(tree) is tree and precision.policies == ()
    assert isinstance(precision.default_loss_scale(), jt.NoOpLossScale)


def test_a_policy_casts_as_it_does_alone():
    policy = jt.get_policy("p=bf16,c=f16,o=f32")
    precision = jt.get_precision(policy)
    tree = {"w": jnp.ones(2), "n": jnp.arange(2)}
    for name in ("cast_to_param", "cast_to_compute"):
        ours, theirs = getattr(precision, name)(tree), getattr(policy, name)(tree)
        assert jax.tree.map(lambda x: x.dtype, ours) == jax.tree.map(lambda x: x.dtype, theirs)


@pytest.mark.parametrize(
    "given,dynamic",
    [
        ("mixed_float16", True),
        ("mixed_bfloat16", False),
        ("float16", True),
        (jt.Rules(HALF_RULES), True),
        (jt.Rules([("**", "mixed_bfloat16")]), False),
    ],
)
def test_a_step_gets_the_loss_scale_that_its_precision_needs(given, dynamic):
    stepper = jt.make_step(lambda p, b: (p * b).sum(), optax.sgd(0.1), given)
    scale = stepper.init(jnp.ones(2)).loss_scale
    assert isinstance(scale, jt.DynamicLossScale if dynamic else jt.NoOpLossScale)
    assert jt.default_loss_scale(given) == scale


def test_one_precision_serves_the_model_and_the_step():
    """A gradient of 2^-25 is zero in float16 but for the loss scale, here 2^16 by default."""
    precision = jt.get_precision("float32", [("**", "mixed_float16")])
    net = apply_policy(nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0)), precision)
    graph, params = nnx.split(net, nnx.Param)

    def loss_fn(params, batch):
        return nnx.merge(graph, params)(batch).astype(jnp.float32).mean() * 2.0**-25

    found = []
    for scale in (None, jt.NoOpLossScale()):
        stepper = jt.make_step(loss_fn, optax.sgd(1.0), precision, loss_scale=scale)
        state = stepper.init(jax.tree.map(jnp.zeros_like, params))
        found.append(stepper.step(state, jnp.ones((4, 2)))[0].params["kernel"].get_value())
    assert (found[0] == -(2.0**-25)).all()
    assert (found[1] == 0).all()


@pytest.mark.parametrize("given", [jt.get_precision("float32"), jt.Rules("bf16"), [("**", "bf16")]])
def test_rules_beside_rules_or_a_precision_are_refused(given):
    with pytest.raises(ValueError, match="rules are given beside a .*; expected one or the other"):
        jt.get_precision(given, [("head", "float32")])


def test_the_constructor_parses_as_get_precision_does():
    assert jt.Precision("mixed_float16") == jt.get_precision("mixed_float16")
    rules = jt.Precision(None, [("**", "float16")])
    assert rules == jt.get_precision([("**", "float16")]) == jt.get_precision(jt.Rules("float16"))
    assert isinstance(rules.default_loss_scale(), jt.DynamicLossScale)
    with pytest.raises(ValueError, match="did you mean"):
        jt.Precision("mixed_float17")


def test_another_type_is_refused_with_what_is_expected():
    with pytest.raises(TypeError, match="policy is 16; expected a string .*Rules, a Precision"):
        jt.get_precision(16)
