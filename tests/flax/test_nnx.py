"""Policies on NNX models that know nothing of them: dtypes from the jaxpr, values against float32."""

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
# A forward pass of a few layers of order 1: some units in the last place of the format.
TOLERANCE = {"mixed_bfloat16": 16 * 2**-8, "mixed_float16": 16 * 2**-11}


class Block(nnx.Module):
    """Plain code: raw parameters, residuals, softmax inside the attention, Flax's own layers."""

    def __init__(self, d, rngs):
        self.norm1 = nnx.LayerNorm(d, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, d, decode=False, rngs=rngs)
        self.norm2 = nnx.RMSNorm(d, rngs=rngs)
        self.up = nnx.Linear(d, 4 * d, rngs=rngs)
        self.down = nnx.Linear(4 * d, d, rngs=rngs)
        self.gain = nnx.Param(jnp.full(d, 0.5))

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x)))) * self.gain


class Net(nnx.Module):
    def __init__(self, rngs, d=16):
        self.embed = nnx.Embed(11, d, rngs=rngs)
        self.blocks = nnx.List([Block(d, rngs) for _ in range(2)])
        self.head = nnx.Linear(d, 11, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.encode(tokens))

    def encode(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x


TOKENS = jnp.arange(10).reshape(2, 5) % 11


def pure(model):
    """A model as a function of its parameters and inputs, and its parameters."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, *args: nnx.merge(graph, params, rest, copy=True)(*args), params


def jaxpr_of(model, *args):
    fn, params = pure(model)
    return jax.make_jaxpr(lambda params: fn(params, *args))(params)


@pytest.mark.parametrize("policy", ONE_QUICK)
def test_every_product_runs_in_half_and_the_delicate_rest_in_float32(policy):
    net = Net(nnx.Rngs(0))
    under = apply_policy(net, policy)
    assert_contractions_in(*pure(net), TOKENS, dtype="float32")
    assert_contractions_in(*pure(under), TOKENS, dtype=HALVES[policy])
    assert_reductions_in(*pure(under), TOKENS)
    assert set(result_dtypes(jaxpr_of(under, TOKENS), "exp", "rsqrt")) == {"float32"}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ONE_QUICK)
def test_values_and_gradients_are_those_of_float32_but_for_rounding(policy):
    net = Net(nnx.Rngs(0))
    under = apply_policy(net, policy)
    forward = nnx.jit(lambda model: model(TOKENS))
    assert forward(under).dtype == jnp.float32
    np.testing.assert_allclose(forward(under), forward(net), atol=TOLERANCE[policy])

    def loss(model):
        logits = model(TOKENS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean()

    ours, theirs = (jax.tree.leaves(nnx.jit(nnx.grad(loss))(model)) for model in (under, net))
    # Against the largest gradient of the model: that of a key's bias is zero but for rounding.
    scale = max(float(jnp.abs(b).max()) for b in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=TOLERANCE[policy] * scale)


def test_rules_give_each_module_its_dtype():
    rules = [("head", "float32"), ("blocks/1/**", "mixed_float16"), ("**", "mixed_bfloat16")]
    net = Net(nnx.Rngs(0))
    per_block = sum(result_dtypes(jaxpr_of(net, TOKENS)).values()) // 2
    counts = result_dtypes(jaxpr_of(apply_policy(net, rules), TOKENS))
    assert counts == {"float32": 1, "float16": per_block, "bfloat16": per_block}


def test_activations_between_modules_are_handed_on_in_half():
    # The residual stream and the raw parameter's product: in half, not in float32 as by promotion.
    jaxpr = jaxpr_of(apply_policy(Net(nnx.Rngs(0)), "mixed_bfloat16"), TOKENS)
    kept = [
        eqn.outvars[0].aval.dtype
        for eqn in jaxpr.jaxpr.eqns
        if eqn.primitive.name == "add" and eqn.outvars[0].aval.shape == (2, 5, 16)
        and not any(isinstance(v, jax.extend.core.Literal) for v in eqn.invars)
    ]  # fmt: skip
    assert kept.count(jnp.bfloat16) >= 4


def test_parameters_are_stored_in_their_dtype_under_the_same_names_and_shapes():
    net = Net(nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    under = apply_policy(net, [("**/norm*", "float32"), ("**", "bf16")])
    after = nnx.to_pure_dict(nnx.state(under, nnx.Param))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    chex.assert_trees_all_equal_shapes(before, after)
    assert after["head"]["kernel"].dtype == jnp.bfloat16
    assert after["blocks"][0]["norm1"]["scale"].dtype == jnp.float32
    assert under(TOKENS).dtype == jnp.bfloat16
    # The model that was given is as it was.
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(net, nnx.Param)), before)
    assert before["head"]["kernel"].dtype == jnp.float32


def test_parameters_of_one_fit_into_the_other():
    net = Net(nnx.Rngs(0))
    under = apply_policy(Net(nnx.Rngs(1)), "mixed_bfloat16")
    nnx.update(under, nnx.state(net, nnx.Param))
    np.testing.assert_array_equal(under(TOKENS), apply_policy(net, "mixed_bfloat16")(TOKENS))


def test_it_is_a_model_of_the_same_type_with_all_its_methods():
    net = Net(nnx.Rngs(0))
    under = apply_policy(net, "mixed_bfloat16")
    assert isinstance(under, Net) and type(under).__name__ == "Net"
    assert_contractions_in(lambda t: under.encode(t), TOKENS)


def test_equal_rules_compile_once():
    @chex.assert_max_traces(n=1)
    def forward(params, rest, graph):
        return nnx.merge(graph, params, rest)(TOKENS)

    jitted = jax.jit(forward, static_argnums=2)
    for _ in range(2):
        graph, params, rest = nnx.split(apply_policy(Net(nnx.Rngs(0)), "bf16"), nnx.Param, ...)
        jitted(params, rest, graph)


class Noisy(nnx.Module):
    """BatchNorm, Dropout, a convolution and a layer whose author wanted half."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.group = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.out = nnx.Linear(8, 4, dtype=jnp.float16, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = nnx.relu(self.group(self.norm(self.conv(x))))
        x = self.dropout(x.mean((1, 2)), rngs=rngs, deterministic=rngs is None)
        return self.out(x)


IMAGES = jax.random.normal(jax.random.key(5), (4, 6, 6, 3))


def test_batch_statistics_stay_float32_and_move_as_without_a_policy():
    net = Noisy(nnx.Rngs(0))
    under = apply_policy(net, "mixed_bfloat16")
    call = nnx.jit(lambda model: model(IMAGES))
    for model in (net, under):
        call(model)
    assert under.norm.mean[...].dtype == under.norm.var[...].dtype == jnp.float32
    assert float(jnp.abs(under.norm.mean[...]).max()) > 0
    np.testing.assert_allclose(under.norm.mean[...], net.norm.mean[...], atol=2**-8)
    np.testing.assert_allclose(under.norm.var[...], net.norm.var[...], atol=2**-8)


@pytest.mark.slow
def test_random_streams_that_are_passed_in_move_on():
    under = apply_policy(Noisy(nnx.Rngs(0)), "mixed_bfloat16")
    rngs = nnx.Rngs(dropout=3)
    first, second = under(IMAGES, rngs=rngs), under(IMAGES, rngs=rngs)
    assert int(rngs.dropout.count[...]) == 2
    assert float(jnp.abs(first - second).max()) > 0


def test_a_rule_takes_the_place_of_the_dtype_that_an_author_gave_a_layer():
    under = apply_policy(Noisy(nnx.Rngs(0)), [("out", "float32"), ("**", "mixed_bfloat16")])
    assert result_dtypes(jaxpr_of(under, IMAGES)) == {"bfloat16": 1, "float32": 1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nnx.LSTMCell, nnx.GRUCell, nnx.SimpleCell])
def test_recurrent_cells_run_in_half(kind):
    class Recurrent(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(kind(4, 8, rngs=rngs))

        def __call__(self, x):
            return self.rnn(x)

    net = Recurrent(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 4))
    under = apply_policy(net, "mixed_bfloat16")
    np.testing.assert_allclose(under(x), net(x), atol=2**-4)
    assert_contractions_in(*pure(under), x)


class Stacked(nnx.Module):
    """Layers made by vmap and run by scan, each step rematerialised."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return Block(16, rngs)

        self.layers = make(rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x, layer):
            return layer(x)

        return self.head(forward(x, self.layers))


@pytest.mark.parametrize("policy", ONE_QUICK)
@pytest.mark.slow
def test_layers_under_scan_and_remat(policy):
    net = Stacked(nnx.Rngs(0))
    under = apply_policy(net, [("head", "float32"), ("**", policy)])
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    forward = nnx.jit(lambda model: model(x))
    np.testing.assert_allclose(forward(under), forward(net), atol=2 * TOLERANCE[policy])
    counts = result_dtypes(jaxpr_of(under, x))
    assert counts["float32"] == 1 and counts[HALVES[policy].__name__] >= 6
    ours, theirs = (
        nnx.jit(nnx.grad(lambda model: (model(x) ** 2).mean()))(model).layers.up.kernel[...]
        for model in (under, net)
    )
    np.testing.assert_allclose(
        ours, theirs, atol=4 * TOLERANCE[policy] * float(jnp.abs(theirs).max())
    )


def test_a_shared_module_has_one_policy_and_one_parameter():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 4, rngs=rngs)
            self.again = self.first

        def __call__(self, x):
            return self.again(nnx.relu(self.first(x)))

    under = apply_policy(Tied(nnx.Rngs(0)), "mixed_bfloat16")
    assert under.first is under.again
    assert result_dtypes(jaxpr_of(under, jnp.ones((2, 4)))) == {"bfloat16": 2}
    assert len(jax.tree.leaves(nnx.state(under, nnx.Param))) == 2


def test_a_linen_module_inside_by_the_bridge():
    net = nnx.bridge.ToNNX(nn.Dense(3), nnx.Rngs(0)).lazy_init(jnp.ones((2, 4)))
    under = apply_policy(net, "mixed_bfloat16")
    assert_contractions_in(*pure(under), jnp.ones((2, 4)))


@pytest.mark.slow
def test_it_trains_with_make_step_and_with_nnx_optimizer():
    under = apply_policy(Noisy(nnx.Rngs(0)), "mixed_float16")
    labels = jnp.arange(4)
    graph, params, state = nnx.split(under, nnx.Param, ...)

    def loss_fn(params, batch, *, model_state):
        net = nnx.merge(graph, params, model_state, copy=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(net(batch), labels).mean()
        return loss, None, nnx.state(net, nnx.Not(nnx.Param))

    stepper = jt.make_step(loss_fn, optax.adam(1e-2), loss_scale=jt.DynamicLossScale(2.0**12))
    train = stepper.init(params, model_state=state)
    losses = []
    with assert_one_compilation(stepper.step) as train_step:
        for _ in range(20):
            train, info = train_step(train, IMAGES)
            losses.append(float(info.loss))
    assert losses[-1] < losses[0] - 0.3 and int(train.skipped) == 0

    optimizer = nnx.Optimizer(under, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(IMAGES), labels).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    values = [float(step(under, optimizer)) for _ in range(20)]
    assert values[-1] < values[0] - 0.3


@pytest.mark.slow
def test_a_published_model_runs_unedited():
    # Mamba 2 as its authors published it on PyPI: scans, cumulative sums, raw parameters, no dtypes.
    mamba2 = pytest.importorskip("mamba2_jax")
    config = mamba2.Mamba2Config(
        vocab_size=50, hidden_size=32, state_size=8, head_dim=8, chunk_size=8, num_hidden_layers=2
    )
    net = mamba2.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    tokens = jnp.arange(32).reshape(2, 16) % 50
    forward = nnx.jit(lambda model: model(tokens)["logits"])
    want = forward(net)
    for policy, half in HALVES.items():
        under = apply_policy(net, policy)
        got = forward(under)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=4 * TOLERANCE[policy])  # logits reach 3
        graph, params = nnx.split(under)
        grad = jax.grad(lambda p, g=graph: nnx.merge(g, p)(tokens)["logits"].sum())
        assert_contractions_in(grad, params, dtype=half)
    paths = [row.path for row in explain(net, "mixed_bfloat16").rows]
    assert paths[0] == "" and any("mixer" in path for path in paths)


def test_a_rule_that_matches_no_module_is_refused_with_the_nearest_paths():
    with pytest.raises(ValueError, match="'haed' .* matches no module; the nearest are 'head'"):
        apply_policy(Net(nnx.Rngs(0)), [("haed", "float32"), ("**", "bf16")])


def test_another_object_than_a_flax_module_is_refused():
    for function in (apply_policy, explain):
        with pytest.raises(TypeError, match=r"expects an nnx.Module or a linen.Module"):
            function(lambda x: x, "bf16")
