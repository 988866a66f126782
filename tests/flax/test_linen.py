"""Policies on Linen models that know nothing of them: dtypes from the jaxpr, values against float32."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers.programs import result_dtypes

import jmp_train as jt
from jmp_train.flax import apply_policy, explain
from jmp_train.testing import assert_contractions_in, assert_one_compilation, assert_reductions_in

HALVES = {"mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}
ONE_QUICK = ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)]
TOLERANCE = {"mixed_bfloat16": 16 * 2**-8, "mixed_float16": 16 * 2**-11}
KEY = jax.random.key(0)
TOKENS = jnp.arange(10).reshape(2, 5) % 11


class Block(nn.Module):
    d: int

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attn")(h)
        gain = self.param("gain", nn.initializers.constant(0.5), (self.d,))
        h = nn.BatchNorm(use_running_average=not train, name="norm2")(x)
        h = nn.gelu(nn.Dense(4 * self.d, name="up")(h))
        h = nn.Dropout(0.1, deterministic=not train)(h)
        return x + nn.Dense(self.d, name="down")(h) * gain


class Net(nn.Module):
    @nn.compact
    def __call__(self, tokens, train=False):
        x = nn.Embed(11, 16, name="embed")(tokens)
        for i in range(2):
            x = nn.remat(Block, static_argnums=(2,))(16, name=f"block{i}")(x, train)
        return nn.Dense(11, name="head")(x)


def jaxpr_of(model, variables, *args, **options):
    return jax.make_jaxpr(functools.partial(model.apply, **options))(variables, *args)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ONE_QUICK)
def test_every_product_runs_in_half_and_the_delicate_rest_in_float32(policy):
    net = Net()
    variables = net.init(KEY, TOKENS)
    under = apply_policy(net, policy)
    assert_contractions_in(net.apply, variables, TOKENS, dtype="float32")
    assert_contractions_in(under.apply, variables, TOKENS, dtype=HALVES[policy])
    assert_reductions_in(under.apply, variables, TOKENS)
    jaxpr = jaxpr_of(under, variables, TOKENS)
    assert set(result_dtypes(jaxpr, "exp", "rsqrt")) == {"float32"}


@pytest.mark.parametrize("policy", ONE_QUICK)
@pytest.mark.slow
def test_values_and_gradients_are_those_of_float32_but_for_rounding(policy):
    net, under = Net(), apply_policy(Net(), policy)
    variables = net.init(KEY, TOKENS)
    got, want = (jax.jit(model.apply)(variables, TOKENS) for model in (under, net))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=TOLERANCE[policy])

    def loss(params, model):
        logits = model.apply({**variables, "params": params}, TOKENS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean()

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    ours, theirs = (grad(variables["params"], model) for model in (under, net))
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    # Against the largest gradient of the model: that of a key's bias is zero but for rounding.
    scale = max(float(jnp.abs(b).max()) for b in jax.tree.leaves(theirs))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE[policy] * scale)


def test_rules_give_each_module_its_dtype():
    rules = [("head", "float32"), ("block1/**", "mixed_float16"), ("**", "mixed_bfloat16")]
    net = Net()
    variables = net.init(KEY, TOKENS)
    per_block = sum(result_dtypes(jaxpr_of(net, variables, TOKENS)).values()) // 2
    counts = result_dtypes(jaxpr_of(apply_policy(net, rules), variables, TOKENS))
    assert counts == {"float32": 1, "float16": per_block, "bfloat16": per_block}


@pytest.mark.slow
def test_parameters_are_stored_in_their_dtype_under_the_same_names_and_shapes():
    plain = Net().init(KEY, TOKENS)
    under = apply_policy(Net(), [("**/norm*", "float32"), ("**", "bf16")])
    variables = under.init(KEY, TOKENS)
    chex.assert_trees_all_equal_shapes(plain, variables)
    assert variables["params"]["head"]["kernel"].dtype == jnp.bfloat16
    assert variables["params"]["block0"]["gain"].dtype == jnp.bfloat16
    assert variables["params"]["block0"]["norm1"]["scale"].dtype == jnp.float32
    assert {str(x.dtype) for x in jax.tree.leaves(variables["batch_stats"])} == {"float32"}
    assert under.apply(variables, TOKENS).dtype == jnp.bfloat16
    mixed = apply_policy(Net(), "mixed_bfloat16").init(KEY, TOKENS)
    chex.assert_trees_all_equal(plain, mixed)


def test_statistics_stay_float32_and_dropout_draws_what_it_drew():
    net, under = Net(), apply_policy(Net(), "mixed_float16")
    variables = net.init(KEY, TOKENS)
    options = {"train": True, "rngs": {"dropout": KEY}, "mutable": ["batch_stats"]}
    calls = (jax.jit(functools.partial(m.apply, **options)) for m in (under, net))
    (got, ours), (want, theirs) = (call(variables, TOKENS) for call in calls)
    chex.assert_trees_all_equal_dtypes(ours, theirs)
    chex.assert_trees_all_close(ours, theirs, atol=2**-8)
    np.testing.assert_allclose(got, want, atol=TOLERANCE["mixed_float16"])


@pytest.mark.slow
def test_init_with_output_agrees_with_init_and_apply():
    under = apply_policy(Net(), "bf16")
    out, variables = under.init_with_output(KEY, TOKENS)
    chex.assert_trees_all_equal(variables, under.init(KEY, TOKENS))
    np.testing.assert_array_equal(
        np.asarray(out, np.float32), np.asarray(under.apply(variables, TOKENS), np.float32)
    )


def test_it_is_a_module_of_the_same_type_and_equal_ones_are_equal():
    under = apply_policy(Net(), "bf16")
    assert isinstance(under, Net) and type(under).__name__ == "Net"
    assert under == apply_policy(Net(), "bf16") and hash(under) == hash(apply_policy(Net(), "bf16"))
    assert under != apply_policy(Net(), "f16")


def test_a_rule_takes_the_place_of_the_dtype_that_an_author_gave_a_layer():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, dtype=jnp.float16, name="out")(nn.Dense(4, dtype=jnp.bfloat16)(x))

    under = apply_policy(Half(), [("out", "float32"), ("**", "mixed_float16")])
    variables = under.init(KEY, jnp.ones((2, 4)))
    counts = result_dtypes(jaxpr_of(under, variables, jnp.ones((2, 4))))
    assert counts == {"float32": 1, "float16": 1}


class Stacked(nn.Module):
    """Layers under scan, each step rematerialised, made in setup."""

    def setup(self):
        layers = nn.scan(
            nn.remat(Step), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        self.layers = layers()
        self.head = nn.Dense(3)

    def __call__(self, x):
        x, _ = self.layers(x, None)
        return self.head(x)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8)(nn.relu(nn.LayerNorm()(x))), None


@pytest.mark.parametrize("policy", ONE_QUICK)
def test_layers_under_scan_and_remat(policy):
    net, under = Stacked(), apply_policy(Stacked(), [("head", "float32"), ("**", policy)])
    x = jax.random.normal(KEY, (4, 8))
    variables = under.init(KEY, x)
    np.testing.assert_allclose(
        under.apply(variables, x), net.apply(variables, x), atol=2 * TOLERANCE[policy]
    )
    counts = result_dtypes(jaxpr_of(under, variables, x))
    assert counts == {"float32": 1, HALVES[policy].__name__: 1}


@pytest.mark.slow
def test_recurrent_cells_run_in_half():
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.RNN(nn.OptimizedLSTMCell(8))(x)

    x = jax.random.normal(KEY, (2, 5, 4))
    under = apply_policy(Recurrent(), "mixed_bfloat16")
    variables = under.init(KEY, x)
    want = Recurrent().apply(variables, x)
    np.testing.assert_allclose(under.apply(variables, x), want, atol=2**-4)
    assert_contractions_in(under.apply, variables, x)


def test_a_shared_module_has_one_parameter():
    class Tied(nn.Module):
        def setup(self):
            self.embed = nn.Embed(11, 8)

        def __call__(self, tokens):
            return self.embed.attend(self.embed(tokens))

    under = apply_policy(Tied(), "mixed_bfloat16")
    variables = under.init(KEY, TOKENS)
    assert len(jax.tree.leaves(variables)) == 1
    assert_contractions_in(under.apply, variables, TOKENS)


def test_an_nnx_module_inside_by_the_bridge():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nnx.bridge.to_linen(nnx.Linear, 4, 3, name="inner")(x)

    under = apply_policy(Outer(), "mixed_bfloat16")
    variables = under.init(KEY, jnp.ones((2, 4)))
    assert_contractions_in(under.apply, variables, jnp.ones((2, 4)))


@pytest.mark.slow
def test_it_trains_with_make_step():
    under = apply_policy(Net(), "mixed_float16")
    variables = under.init(KEY, TOKENS)

    def loss_fn(params, batch, *, model_state, key):
        logits, changed = under.apply(
            {"params": params, "batch_stats": model_state}, batch, train=True,
            rngs={"dropout": key}, mutable=["batch_stats"],
        )  # fmt: skip
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch).mean()
        return loss, None, changed["batch_stats"]

    stepper = jt.make_step(loss_fn, optax.adam(1e-2), loss_scale=jt.DynamicLossScale(2.0**12))
    state = stepper.init(variables["params"], model_state=variables["batch_stats"], key=KEY)
    losses = []
    with assert_one_compilation(stepper.step) as step:
        for _ in range(20):
            state, info = step(state, TOKENS)
            losses.append(float(info.loss))
    assert losses[-1] < losses[0] - 0.5 and int(state.skipped) == 0


@pytest.mark.slow
def test_a_published_model_runs_unedited():
    # A ResNet as its author published it on PyPI in 2022: partials, Sequential, BatchNorm.
    jax_resnet = pytest.importorskip("jax_resnet")
    net = jax_resnet.ResNet18(n_classes=10)
    images = jax.random.normal(KEY, (2, 32, 32, 3))
    variables = jax.jit(net.init)(KEY, images)

    def loss(params, model):
        out, changed = model.apply({**variables, "params": params}, images, mutable=["batch_stats"])
        return (jax.nn.log_softmax(out)[:, 0]).mean(), changed

    jitted = lambda params, model: jax.jit(lambda p: loss(p, model))(params)
    want, _ = jitted(variables["params"], net)
    for policy, half in HALVES.items():
        under = apply_policy(net, policy)
        got, changed = jitted(variables["params"], under)
        np.testing.assert_allclose(got, want, atol=TOLERANCE[policy])
        assert {str(x.dtype) for x in jax.tree.leaves(changed)} == {"float32"}
        grad = jax.grad(lambda p, m=under: loss(p, m)[0])
        assert_contractions_in(grad, variables["params"], dtype=half)
    assert len(explain(net, "mixed_bfloat16", images).rows) > 40


def test_a_rule_that_matches_no_module_is_refused_at_init_and_apply():
    variables = Net().init(KEY, TOKENS)
    under = apply_policy(Net(), [("haed", "float32"), ("**", "bf16")])
    for call in (
        lambda: under.init(KEY, TOKENS),
        lambda: under.apply(variables, TOKENS),
        lambda: explain(Net(), [("haed", "float32")], TOKENS),
    ):
        with pytest.raises(ValueError, match="'haed' .* matches no module; the nearest are 'head'"):
            call()
