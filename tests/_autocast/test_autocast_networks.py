"""Networks written in plain float32, under autocast: every product in half, training as before."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.marks import slow
from jax import lax

import jmp_train as jt


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class ResNetBlock(nnx.Module):
    def __init__(self, width, rngs):
        self.stem = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.convs = nnx.List([nnx.Conv(width, width, (3, 3), rngs=rngs) for _ in range(2)])
        self.norms = nnx.List([nnx.BatchNorm(width, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.stem(x)
        y = nnx.relu(self.norms[0](self.convs[0](x)))
        return nnx.relu(x + self.norms[1](self.convs[1](y)))


@jax.custom_vjp
def equilibrium(w, x):
    """The z with z = tanh(z @ w + x), found by iteration."""
    return lax.fori_loop(0, 20, lambda _, z: jnp.tanh(z @ w + x), x * 0)


def _equilibrium_fwd(w, x):
    z = equilibrium(w, x)
    return z, (w, x, z)


def _equilibrium_bwd(residuals, ct):
    w, x, z = residuals
    _, vjp = jax.vjp(lambda w, x, z: jnp.tanh(z @ w + x), w, x, z)
    u = lax.fori_loop(0, 20, lambda _, u: ct + vjp(u)[2], ct)
    return vjp(u)[:2]


equilibrium.defvjp(_equilibrium_fwd, _equilibrium_bwd)


def transformer(seed=0, width=32):
    """Returns a loss of (parameters, inputs, labels), and the first two."""
    graph, params = nnx.split(Block(width, nnx.Rngs(seed)))

    def logits(params, x):
        return nnx.merge(graph, params)(x)

    return logits, params, (8, 16, width)


def lstm(seed=0, width=32):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "inputs": jax.random.normal(keys[0], (width, 4 * width)) * width**-0.5,
        "hidden": jax.random.normal(keys[1], (width, 4 * width)) * width**-0.5,
        "bias": jnp.zeros(4 * width),
    }

    def logits(params, x):
        def step(carry, x_t):
            h, c = carry
            gates = x_t @ params["inputs"] + h @ params["hidden"] + params["bias"]
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((x.shape[0], width))
        return lax.scan(step, (zeros, zeros), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return logits, params, (8, 16, width)


def resnet(seed=0, width=8):
    graph, params, rest = nnx.split(ResNetBlock(width, nnx.Rngs(seed)), nnx.Param, ...)

    def logits(params, x):
        return nnx.merge(graph, params, rest, copy=True)(x)  # statistics move in the copy

    return logits, params, (8, 12, 12, 1)


def implicit(seed=0, width=32):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = [0.2 * jax.random.normal(k, (width, width)) * width**-0.5 for k in keys]
    return (lambda p, x: equilibrium(p[0], x @ p[1])), params, (8, 16, width)


NETWORKS = {"transformer": transformer, "lstm": lstm, "resnet": resnet, "implicit": implicit}


def loss_and_data(name, seed=0, **size):
    logits, params, shape = NETWORKS[name](seed, **size)
    x = jax.random.normal(jax.random.key(100), shape)
    labels = (x.mean(-1) > 0).astype(jnp.int32)

    def loss(params, x, labels):
        log_p = jax.nn.log_softmax(logits(params, x))
        return -jnp.take_along_axis(log_p, labels[..., None], -1).mean()

    return loss, params, x, labels


def products(lowered):
    """Result dtypes of the matrix products and convolutions of a program, and how many."""
    text = lowered.as_text()
    op = r"stablehlo\.(?:dot_general|convolution)\b.*-> tensor<(?:\d+x)*(\w+)>"
    return collections.Counter(re.findall(op, text))


@pytest.mark.parametrize("dtype,short", [("bfloat16", "bf16"), slow("float16", "f16")])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_product_of_a_training_step_is_in_half(name, dtype, short):
    loss, params, x, labels = loss_and_data(name)
    plain = products(jax.jit(jax.grad(loss)).lower(params, x, labels))
    outside = jax.jit(jax.grad(jt.autocast(loss, dtype))).lower(params, x, labels)
    inside = jax.jit(jt.autocast(jax.grad(loss), dtype)).lower(params, x, labels)
    assert products(outside) == {short: plain["f32"]} == products(inside)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_gradients_are_those_of_float32_but_for_rounding(name):
    loss, params, x, labels = loss_and_data(name)
    want = jax.jit(jax.grad(loss))(params, x, labels)
    got = jax.jit(jax.grad(jt.autocast(loss)))(params, x, labels)

    # A few times bfloat16's 2**-8, of the whole gradient: attention's key bias has none at all.
    difference = jax.tree.map(jnp.subtract, got, want)
    assert optax.tree.norm(difference) < 0.03 * optax.tree.norm(want)
    assert all(g.dtype == w.dtype for g, w in zip(*map(jax.tree.leaves, (got, want)), strict=True))


def test_activations_kept_for_the_backward_pass_take_at_most_six_tenths():
    # What is kept between the two passes is read from jax.vjp, so it does not depend on the CPU
    # compiler, which widens bfloat16 to float32 again.
    loss, params, x, labels = loss_and_data("transformer", width=256)
    x = jnp.zeros((16, 128, 256))
    labels = jnp.zeros((16, 128), jnp.int32)

    def kept(loss):
        def residuals(params):
            return jax.vjp(lambda p: loss(p, x, labels), params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, params))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    assert kept(jt.autocast(loss)) <= 0.6 * kept(loss), kept(jt.autocast(loss)) / kept(loss)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _train(loss, params, x, labels, steps, scale=1.0):
    optimizer = optax.adam(3e-3)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(lambda p: loss(p, x, labels) * scale)(params)
        grads = jax.tree.map(lambda g: g / scale, grads)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value / scale

    return lax.scan(step, (params, optimizer.init(params)), None, length=steps)[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_training_follows_float32_within_the_noise_of_its_seeds(name):
    curves = collections.defaultdict(list)
    for seed in range(5):
        loss, params, x, labels = loss_and_data(name, seed)
        curves["float32"].append(_train(loss, params, x, labels, 40))
        curves["bfloat16"].append(_train(jt.autocast(loss), params, x, labels, 40))
        half = jt.autocast(loss, "float16")
        curves["float16"].append(_train(half, params, x, labels, 40, scale=1024.0))
    full = np.stack(curves["float32"])
    assert full[:, -1].mean() < 0.9 * full[:, 0].mean()  # it learns at all
    noise = full.std(axis=0, ddof=1)
    for dtype in ("bfloat16", "float16"):
        apart = np.abs(np.stack(curves[dtype]).mean(axis=0) - full.mean(axis=0))
        assert np.all(apart <= np.maximum(2 * noise, 0.01)), (dtype, apart.max(), noise.min())
