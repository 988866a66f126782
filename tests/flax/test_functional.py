"""A network as functions: NNX and Linen alike, with dropout keys, flags and model state."""

import chex
import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jmp_train as jt
from jmp_train.flax.functional import functional

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


class NnxNet(nnx.Module):
    def __init__(self, rngs, dropout=0.0, **dtypes):
        self.first = nnx.Linear(3, 5, rngs=rngs, **dtypes)
        self.last = nnx.Linear(5, 2, rngs=rngs, **dtypes)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x, rngs=None):
        x = self.dropout(nnx.relu(self.first(x)), deterministic=rngs is None, rngs=rngs)
        return self.last(x)


class LinenNet(linen.Module):
    dropout: float = 0.0

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(5, name="first")(x))
        x = linen.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)
        return linen.Dense(2, name="last")(x)


def nnx_of(precision, dropout=0.0):
    def make(dtype, param_dtype, rngs):
        return NnxNet(rngs, dropout, dtype=dtype, param_dtype=param_dtype)

    return functional(make, jt.get_precision(precision), takes_dtype=True)


def linen_of(precision, dropout=0.0):
    make = lambda dtype, param_dtype, rngs: LinenNet(dropout)
    return functional(make, jt.get_precision(precision), lambda net: net(X))


PRECISIONS = ["float32", "mixed_bfloat16", [("last", "float32"), ("**", "mixed_float16")]]


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS, ids=["float32", "bf16", "rules"])
def test_both_libraries_train_alike_from_equal_parameters(precision):
    """Within the rounding of the compute dtype: the libraries order casts and sums in their own way."""
    losses = []
    start, _ = nnx_of("float32").init(jax.random.key(0))
    for net in (nnx_of(precision), linen_of(precision)):
        shapes, state = jax.eval_shape(net.init, jax.random.key(0))
        assert state is None
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, start)

        def loss_fn(params, batch, net=net):
            params, batch = net.precision.cast_to_compute((params, batch))
            out, _ = net.apply(params, None, batch, train=True)
            return (out.astype(jnp.float32) ** 2).mean()

        stepper = jt.make_step(loss_fn, optax.sgd(0.1), net.precision,
                               loss_scale=jt.StaticLossScale(2.0**4))  # fmt: skip
        state = stepper.init(start)
        for _ in range(5):
            state, info = stepper.step(state, X)
        losses.append(float(info.loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6 if precision == "float32" else 2e-2)


@pytest.mark.parametrize("make", [nnx_of, linen_of])
def test_a_key_makes_dropout_random_and_no_key_leaves_it_out(make):
    net = make("float32", 0.5)
    params, _ = net.init(jax.random.key(0))
    call = lambda key=None: np.asarray(
        net.apply(params, None, X, train=key is not None, key=key)[0]
    )
    assert (call() == call()).all()
    one, again, two = (call(jax.random.key(n)) for n in (1, 1, 2))
    assert (one == again).all() and (one != two).any() and (one != call()).any()


def test_initial_parameters_are_those_of_the_module_itself():
    ours, _ = nnx_of("float32").init(jax.random.key(3))
    theirs = nnx.state(NnxNet(nnx.Rngs(params=jax.random.key(3))), nnx.Param)
    assert (ours["last"]["kernel"] == theirs["last"]["kernel"][...]).all()


class WithStatistics(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        return linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)


STATISTICS = {
    "nnx": lambda dtype, param_dtype, rngs: nnx.BatchNorm(3, momentum=0.9, rngs=rngs),
    "linen": lambda dtype, param_dtype, rngs: WithStatistics(),
}


@pytest.mark.parametrize("library", STATISTICS)
def test_statistics_change_in_training_and_are_read_in_evaluation(library):
    make = STATISTICS[library]
    net = functional(make, jt.get_precision("float32"), lambda net: net(X, train=False))
    params, state = net.init(jax.random.key(0))
    _, trained = net.apply(params, state, X, train=True)
    out, unchanged = net.apply(params, trained, X)
    # Flax: new = 0.9 old + 0.1 batch, from mean 0 and variance 1.
    exact = X.astype(np.float64)
    mean, var = 0.1 * exact.mean(0), 0.9 + 0.1 * exact.var(0)
    values = sorted(map(np.asarray, jax.tree.leaves(trained)), key=lambda x: float(x.max()))
    np.testing.assert_allclose(values, [mean, var], atol=1e-6)
    np.testing.assert_allclose(out, (exact - mean) / np.sqrt(var + 1e-5), atol=1e-5)
    chex.assert_trees_all_equal(trained, unchanged)


class OwnStreams(nnx.Module):
    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(x)


def test_random_streams_of_a_module_are_no_state_and_follow_the_key():
    make = lambda dtype, param_dtype, rngs: OwnStreams(rngs)
    net = functional(make, jt.get_precision("float32"))
    params, state = net.init(jax.random.key(0))
    assert state is None and not jax.tree.leaves(params)
    ones = jnp.ones(200)
    draw = lambda n: np.asarray(net.apply({}, None, ones, train=True, key=jax.random.key(n))[0])
    assert (draw(1) == draw(1)).all() and (draw(1) != draw(2)).any()
    assert set(draw(1).tolist()) == {0.0, 2.0}
    np.testing.assert_array_equal(net.apply({}, None, ones)[0], ones)


FLAGS = [
    ("train", True),
    ("training", True),
    ("is_training", True),
    ("deterministic", False),
    ("use_running_average", False),
    ("inference", False),
]


@pytest.mark.parametrize("name,in_training", FLAGS)
def test_a_flag_of_any_usual_name_says_whether_it_trains(name, in_training):
    namespace: dict = {}
    exec(f"def apply(params, x, *, {name}): return x, {name}", namespace)  # noqa: S102
    pair = (lambda key: {}, namespace["apply"])
    net = functional(lambda **_: pair, jt.get_precision("float32"))
    for train in (True, False):
        (_, flag), _ = net.apply({}, None, X, train=train)
        assert flag is (train == in_training)


def test_another_object_is_refused():
    with pytest.raises(ValueError, match="the model made 3; expected an nnx.Module"):
        functional(lambda dtype, param_dtype, rngs: 3, jt.get_precision("float32"))


class Sowing(linen.Module):
    """Sows in collections of its own, in one that persists, and adds up."""

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(3)(x))
        self.sow("losses", "aux", (x**2).mean())
        self.sow("batch_stats", "seen", x)
        self.sow("sums", "total", x.sum(), init_fn=lambda: 0.0, reduce_fn=lambda a, b: a + b)
        steps = self.variable("count", "steps", lambda: jnp.zeros((), jnp.int32))
        if train:
            steps.value += 1
        self.sow("count", "value", 1.0)
        return x


class SowingNnx(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
        self.steps = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        x = self.norm(self.dense(x))
        self.steps[...] += 1
        self.sow(nnx.Intermediate, "aux", (x**2).mean())
        return x


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", [Sowing, SowingNnx])
def test_sown_values_are_not_part_of_the_state(kind, policy):
    make = lambda dtype, param_dtype, rngs: kind(**({} if kind is Sowing else {"rngs": rngs}))
    net = functional(make, jt.get_precision(policy), lambda net: net(X))
    params, state = net.init(jax.random.key(0))
    shapes = lambda tree: sorted(x.shape for x in jax.tree.leaves(tree))
    assert shapes(state) == [(), (3,), (3,)]
    for _ in range(2):
        _, state = net.apply(params, state, X, train=True, key=jax.random.key(1))
    assert shapes(state) == [(), (3,), (3,)]
    assert 2 in [int(x) for x in jax.tree.leaves(state) if x.shape == ()]
    _, unchanged = net.apply(params, state, X)
    chex.assert_trees_all_equal(state, unchanged)


def test_only_sown_values_are_no_state():
    class OnlySows(linen.Module):
        @linen.compact
        def __call__(self, x):
            self.sow("losses", "aux", x.mean())
            return linen.Dense(2)(x)

    net = functional(lambda **_: OnlySows(), jt.get_precision("float32"), lambda net: net(X))
    assert net.init(jax.random.key(0))[1] is None


class Sampling(linen.Module):
    rate: float = 0.0

    @linen.compact
    def __call__(self, x):
        x = x + jax.random.normal(self.make_rng("sample"), x.shape)
        return linen.Dropout(self.rate, deterministic=False)(x) if self.rate else x


class SamplingNnx(nnx.Module):
    def __init__(self, rngs):
        self.rngs = rngs

    def __call__(self, x):
        return x + jax.random.normal(self.rngs.sample(), x.shape)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", [Sampling, SamplingNnx])
def test_random_streams_of_evaluation_are_fixed(kind, policy):
    make = lambda dtype, param_dtype, rngs: kind(**({} if kind is Sampling else {"rngs": rngs}))
    net = functional(make, jt.get_precision(policy), lambda net: net(X))
    draw = lambda **options: np.asarray(net.apply({}, None, X, **options)[0])
    assert (draw() == draw()).all() and (draw() != X).all()
    trained = [draw(train=True, key=jax.random.key(n)) for n in (1, 2)]
    assert (trained[0] != trained[1]).any() and (trained[0] != draw()).any()


class OwnDropout(linen.Module):
    """Draws for dropout in evaluation too, which is a mistake."""

    stream: str

    @linen.compact
    def __call__(self, x):
        if self.stream == "own":
            return x * jax.random.bernoulli(self.make_rng("dropout"), 0.5, x.shape)
        return linen.Dropout(0.5, deterministic=False, rng_collection=self.stream)(x)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("stream", ["dropout", "other", "own"])
def test_dropout_that_is_active_in_evaluation_is_an_error(stream, policy):
    make = lambda **_: OwnDropout(stream)
    net = functional(make, jt.get_precision(policy), lambda net: net(X))
    net.apply({}, None, X, train=True, key=jax.random.key(0))
    with pytest.raises(flax.errors.InvalidRngError, match='needs PRNG for "(dropout|other)"'):
        net.apply({}, None, X)
    OwnDropout(stream).apply({}, X, rngs={"params": jax.random.key(0)})  # by Flax alone, as ever


class Doubles(linen.Module):
    width: int = 1
    dtype: object = None

    def __post_init__(self):
        self.width *= 2
        super().__post_init__()

    @linen.compact
    def __call__(self, x):
        return linen.Dense(self.width)(x)


@pytest.mark.parametrize("policy", ["float32", [("**", "mixed_bfloat16")]])
def test_a_module_is_used_as_it_is(policy):
    """Flax copies a module for each call, and calls `__post_init__` for the copy."""
    module = Doubles(1)
    flaxs = module.init(jax.random.key(0), X)["params"]["Dense_0"]["kernel"].shape
    net = functional(lambda **_: module, jt.get_precision(policy), lambda net: net(X))
    params, _ = net.init(jax.random.key(0))
    assert params["Dense_0"]["kernel"].shape == flaxs == (3, 4)
    assert net.apply(params, None, X)[0].shape == (4, 4)
