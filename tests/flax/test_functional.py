"""A network as functions: NNX and Linen alike, with dropout keys, flags and model state."""

import chex
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
