"""A Flax module as functions: NNX and Linen alike, with dropout, and refused with other state."""

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
    def make(policy, rngs):
        dtypes = {"dtype": policy.compute_dtype, "param_dtype": policy.param_dtype}
        return NnxNet(rngs, dropout, **dtypes)

    return functional(make, jt.get_precision(precision))


def linen_of(precision, dropout=0.0):
    return functional(lambda policy, rngs: LinenNet(dropout), jt.get_precision(precision), X)


PRECISIONS = ["float32", "mixed_bfloat16", [("last", "float32"), ("**", "mixed_float16")]]


@pytest.mark.parametrize("precision", PRECISIONS, ids=["float32", "bf16", "rules"])
def test_both_libraries_train_alike_from_equal_parameters(precision):
    """Within the rounding of the compute dtype: the libraries order casts and sums in their own way."""
    losses = []
    start = nnx_of("float32").init(jax.random.key(0))
    for net in (nnx_of(precision), linen_of(precision)):
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, start)

        def loss_fn(params, batch, net=net):
            return (net.apply(params, batch).astype(jnp.float32) ** 2).mean()

        stepper = jt.make_step(loss_fn, optax.sgd(0.1), jt.get_precision(precision),
                               loss_scale=jt.StaticLossScale(2.0**4))  # fmt: skip
        state = stepper.init(start)
        for _ in range(5):
            state, info = stepper.step(state, X)
        losses.append(float(info.loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6 if precision == "float32" else 2e-2)


@pytest.mark.parametrize("make", [nnx_of, linen_of])
def test_a_key_makes_dropout_random_and_no_key_leaves_it_out(make):
    net = make("float32", 0.5)
    params = net.init(jax.random.key(0))
    call = lambda key=None: np.asarray(net.apply(params, X, key=key))
    assert (call() == call()).all()
    one, again, two = (call(jax.random.key(n)) for n in (1, 1, 2))
    assert (one == again).all() and (one != two).any() and (one != call()).any()


def test_initial_parameters_are_those_of_the_module_itself():
    ours = nnx_of("float32").init(jax.random.key(3))
    theirs = nnx.state(NnxNet(nnx.Rngs(params=jax.random.key(3))), nnx.Param)
    assert (ours["last"]["kernel"] == theirs["last"]["kernel"][...]).all()


class WithStatistics(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.BatchNorm(use_running_average=False)(x)


@pytest.mark.parametrize(
    "make,kind",
    [
        (lambda policy, rngs: nnx.BatchNorm(3, rngs=rngs), "BatchStat"),
        (lambda policy, rngs: nnx.Dropout(0.1, rngs=rngs), "Rng"),
        (lambda policy, rngs: WithStatistics(), "batch_stats"),
    ],
    ids=["nnx statistics", "nnx streams", "linen statistics"],
)
def test_other_state_than_parameters_is_refused_in_one_line(make, kind):
    with pytest.raises(ValueError, match=f"state besides parameters .*{kind}.*model_state"):
        functional(make, jt.get_precision("float32"), X)


def test_another_object_is_refused():
    with pytest.raises(TypeError, match="the network is <class 'int'>; expected an nnx.Module"):
        functional(lambda policy, rngs: 3, jt.get_precision("float32"), X)
