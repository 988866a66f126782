"""Losses under autocast: as precise as a float32 loss of half-precision logits.

Each loss is a function of logits (and labels) that knows nothing of precision. It reads logits that
a product with the identity made in half precision. The oracle is the loss without autocast, in
float64, on the same rounded logits.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax.losses
import pytest
from helpers.marks import slow

import jmp_train as jt

BATCH, TIME, CLASSES, LABELS = 4, 12, 32, 5
HALVES = ("bfloat16", "float16")
RNG = np.random.default_rng(0)


def logits(*shape):
    return (3 * RNG.standard_normal(shape)).astype(np.float32)


LOGITS = logits(BATCH, CLASSES)
OTHER = logits(BATCH, CLASSES)
THIRD = logits(BATCH, CLASSES)
FRAMES = logits(BATCH, TIME, CLASSES)
INTEGERS = RNG.integers(1, CLASSES, BATCH)
SEQUENCE = RNG.integers(1, CLASSES, (BATCH, LABELS))
MULTI = RNG.integers(0, 2, (BATCH, CLASSES)).astype(np.float32)
SIGNS = 2 * MULTI - 1
SOFT = RNG.dirichlet(np.ones(CLASSES), BATCH).astype(np.float32)


def one_hot(x):
    return jax.nn.one_hot(INTEGERS, CLASSES, dtype=x.dtype)


def ctc(x):
    pads = jnp.zeros((BATCH, TIME), x.dtype), jnp.zeros((BATCH, LABELS), x.dtype)
    return optax.losses.ctc_loss(x, pads[0], jnp.asarray(SEQUENCE), pads[1])


def like(array, x):
    return jnp.asarray(array, x.dtype)


def fenchel_young(x):
    loss = optax.losses.make_fenchel_young_loss(jax.nn.logsumexp)
    return loss(x, like(SOFT, x))


def einsum_cross_entropy(x):
    """As users write it: the labels' log-probabilities by a product."""
    return -jnp.einsum("bc,bc->b", jax.nn.log_softmax(x), like(SOFT, x))


def einsum_picked(x):
    """The log-probabilities of several labels a row, by a product with one-hots."""
    picked = jnp.eye(CLASSES, dtype=x.dtype)[jnp.asarray(SEQUENCE)]
    return -jnp.einsum("bk,bnk->bn", jax.nn.log_softmax(x), picked)


# name: the loss of logits, and the logits.
LOSSES = {
    "softmax_one_hot": (lambda x: optax.losses.softmax_cross_entropy(x, one_hot(x)), LOGITS),
    "softmax_soft": (lambda x: optax.losses.softmax_cross_entropy(x, like(SOFT, x)), LOGITS),
    "softmax_smoothed": (
        lambda x: optax.losses.softmax_cross_entropy(x, optax.smooth_labels(one_hot(x), 0.1)),
        LOGITS,
    ),
    "softmax_integer": (
        lambda x: optax.losses.softmax_cross_entropy_with_integer_labels(x, jnp.asarray(INTEGERS)),
        LOGITS,
    ),
    "safe_softmax": (lambda x: optax.losses.safe_softmax_cross_entropy(x, one_hot(x)), LOGITS),
    "sigmoid": (lambda x: optax.losses.sigmoid_binary_cross_entropy(x, like(MULTI, x)), LOGITS),
    "sigmoid_focal": (
        lambda x: optax.losses.sigmoid_focal_loss(x, like(MULTI, x), alpha=0.25),
        LOGITS,
    ),
    "poly": (lambda x: optax.losses.poly_loss_cross_entropy(x, one_hot(x)), LOGITS),
    "ctc": (ctc, FRAMES),
    "kl": (lambda x: optax.losses.kl_divergence(jax.nn.log_softmax(x), like(SOFT, x)), LOGITS),
    "kl_log_targets": (
        lambda x: optax.losses.kl_divergence_with_log_targets(
            jax.nn.log_softmax(x), jax.nn.log_softmax(like(OTHER, x))
        ),
        LOGITS,
    ),
    "kl_generalized": (
        lambda x: optax.losses.generalized_kl_divergence(jax.nn.log_softmax(x), like(SOFT, x)),
        LOGITS,
    ),
    "hinge": (lambda x: optax.losses.hinge_loss(x, like(SIGNS, x)), LOGITS),
    "perceptron": (lambda x: optax.losses.perceptron_loss(x, like(SIGNS, x)), LOGITS),
    "sparsemax": (lambda x: optax.losses.sparsemax_loss(x, like(MULTI, x)), LOGITS),
    "multiclass_hinge": (
        lambda x: optax.losses.multiclass_hinge_loss(x, jnp.asarray(INTEGERS)),
        LOGITS,
    ),
    "multiclass_sparsemax": (
        lambda x: optax.losses.multiclass_sparsemax_loss(x, jnp.asarray(INTEGERS)),
        LOGITS,
    ),
    "fenchel_young": (fenchel_young, LOGITS),
    "ranking": (
        lambda x: optax.losses.ranking_softmax_loss(x, like(MULTI, x), reduce_fn=None),
        LOGITS,
    ),
    "dice": (lambda x: optax.losses.dice_loss(x[..., None], like(MULTI, x)[..., None]), LOGITS),
    "squared": (lambda x: optax.losses.squared_error(x, like(OTHER, x)), LOGITS),
    "l2": (lambda x: optax.losses.l2_loss(x, like(OTHER, x)), LOGITS),
    "huber": (lambda x: optax.losses.huber_loss(x, like(OTHER, x)), LOGITS),
    "log_cosh": (lambda x: optax.losses.log_cosh(x, like(OTHER, x)), LOGITS),
    "cosine": (lambda x: optax.losses.cosine_distance(x, like(OTHER, x), epsilon=1e-8), LOGITS),
    "triplet": (
        lambda x: optax.losses.triplet_margin_loss(x, like(OTHER, x), like(THIRD, x), margin=5.0),
        LOGITS,
    ),
    "ntxent": (
        lambda x: optax.losses.ntxent(x, jnp.array([0, 0, 1, 1]))[None],
        LOGITS,
    ),
    "jax_log_softmax": (
        lambda x: (
            -jnp.take_along_axis(jax.nn.log_softmax(x), jnp.asarray(INTEGERS)[:, None], axis=1)
        ),
        LOGITS,
    ),
    "jax_logsumexp": (lambda x: jax.nn.logsumexp(x, axis=-1), LOGITS),
    "flax_log_softmax": (lambda x: -(nn.log_softmax(x) * one_hot(x)).sum(-1), LOGITS),
    "einsum_soft_labels": (einsum_cross_entropy, LOGITS),
    "einsum_one_hots": (einsum_picked, LOGITS),
}


# Losses that begin with other arithmetic on the logits than sums: it runs in half.
ELEMENTWISE = ("sparsemax", "multiclass_sparsemax", "dice")


def rounded(x, dtype):
    return np.asarray(jnp.asarray(x).astype(dtype).astype(jnp.float32))


def network(loss, x):
    return jnp.mean(loss(x @ jnp.eye(x.shape[-1], dtype=x.dtype)))


def assert_precise(name, loss, dtype):
    """The error against float64 exceeds that of the float32 loss by 4e-6 of the value at most.

    That is 32 times 2^-23, for sums in another order. Half precision is off by up to 2^-9
    (bfloat16) or 2^-12 (float16) of a value where anything after the logits is rounded.
    """
    plain, x = LOSSES[name]
    with jax.enable_x64(True):
        exact = float(jnp.mean(plain(jnp.asarray(rounded(x, dtype).astype(np.float64)))))
    ours = float(jax.jit(jt.autocast(functools.partial(network, loss), dtype))(x))
    float32 = float(jnp.mean(plain(jnp.asarray(rounded(x, dtype)))))
    assert abs(ours - exact) <= abs(float32 - exact) + 32 * 2.0**-23 * abs(exact)


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        slow(name) if name in ("ntxent", "ctc", "sigmoid_focal", "einsum_one_hots") else name
        for name in LOSSES
        if name not in ELEMENTWISE
    ],
)
def test_loss_is_as_precise_as_float32_on_half_logits(name, dtype):
    assert_precise(name, LOSSES[name][0], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", LOSSES)
def test_with_precision_keeps_any_loss_in_float32(name, dtype):
    assert_precise(name, jt.with_precision("float32")(LOSSES[name][0]), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("wrap", [jax.jit, jax.vmap, jax.checkpoint], ids=["jit", "vmap", "remat"])
def test_ctc_loss_is_precise_inside_transformations(wrap, dtype):
    loss = LOSSES["ctc"][0]
    wrapped = wrap(lambda x: loss(x)) if wrap is not jax.vmap else None
    assert_precise("ctc", wrapped or (lambda x: jax.vmap(loss)(x[None])[0]), dtype)


@pytest.mark.slow
def test_ctc_gradient_is_that_of_half_logits():
    """Against float64, within bfloat16's rounding of the logits' cotangent."""
    loss, x = LOSSES["ctc"]
    with jax.enable_x64(True):
        half = jnp.asarray(rounded(x, "bfloat16").astype(np.float64))
        exact = np.asarray(jax.jit(jax.grad(lambda x: jnp.mean(loss(x))))(half))
    for grad in (
        jax.grad(jt.autocast(functools.partial(network, loss))),
        jt.autocast(jax.grad(functools.partial(network, loss))),
    ):
        np.testing.assert_allclose(
            jax.jit(grad)(x), exact, rtol=0, atol=2.0**-7 * np.abs(exact).max()
        )


def products(fn, *args):
    """The dtypes of the products that autocast asks for."""
    rows = jt.debug.explain_autocast(fn, *args).rows
    return [row.dtype for row in rows if row.op == "dot_general"]


TOKENS = jnp.array([1, 3, 2])
TABLE = jnp.ones((8, 6))


# Products that people want in half, although an operand holds zeros and ones, and those that are
# sums. name: the function, its arrays, the dtypes of its products.
PRODUCTS = {
    "one_hot_lookup": (lambda t: jax.nn.one_hot(TOKENS, 8) @ t, [TABLE], ["bfloat16"]),
    "dispatch_of_normalised_tokens": (
        lambda x: jnp.einsum("te,td->ed", jax.nn.one_hot(TOKENS, 8), nn.standardize(x)),
        [jnp.ones((3, 6))],
        ["bfloat16"],
    ),
    "dispatch_of_softplus_gated_tokens": (
        lambda x: jnp.einsum("te,td->ed", jax.nn.one_hot(TOKENS, 8), x * jax.nn.softplus(x)),
        [jnp.ones((3, 6))],
        ["bfloat16"],
    ),
    "masked_attention": (
        lambda q: (jax.nn.softmax(q @ q.T) * jnp.tri(3)) @ q,
        [jnp.ones((3, 6))],
        ["bfloat16", "bfloat16"],
    ),
    "log_spectrum_features": (lambda x, w: jnp.log(x) @ w, [TABLE, TABLE.T], ["bfloat16"]),
    "matrix_times_vector": (lambda t, v: t @ v, [TABLE, jnp.ones(6)], ["bfloat16"]),
    "one_output_feature": (lambda t, v: t @ v, [TABLE, jnp.ones((6, 1))], ["bfloat16"]),
    "inner_product": (jnp.vdot, [jnp.ones(6), jnp.ones(6)], ["float32"]),
    "rows_inner_products": (
        lambda t: jnp.einsum("bd,bd->b", t, t),
        [TABLE],
        ["float32"],
    ),
    "picked_log_probabilities": (
        lambda t: jax.nn.log_softmax(t) @ jax.nn.one_hot(TOKENS, 6).T,
        [TABLE],
        ["float32"],
    ),
    "picked_by_where": (
        lambda t: jax.nn.log_softmax(t) @ jnp.where(jnp.tri(6) > 0, 1.0, 0.0),
        [TABLE],
        ["float32"],
    ),
    "picked_by_masked_one_hots": (
        lambda t: (
            jax.nn.log_softmax(t)
            @ (jax.nn.one_hot(TOKENS, 6) * (TOKENS > 1).astype(t.dtype)[:, None]).T
        ),
        [TABLE],
        ["float32"],
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_zeros_and_ones_keep_only_logarithms_in_float32(name):
    fn, args, expected = PRODUCTS[name]
    assert products(fn, *args) == expected
