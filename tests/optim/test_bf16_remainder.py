"""bfloat16 and remainder are float32 parameters of which the model sees the nearest bfloat16, ties
away from zero: what that equals bit for bit, and what it does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marks import slow

import jmp_train as jt
from jmp_train.testing import assert_same_bits

OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-3),
    "adam": lambda: optax.adam(1e-3),
    "sgd": lambda: optax.sgd(3e-2, momentum=0.9),
    "lion": lambda: optax.lion(3e-4),
    "muon": lambda: optax.contrib.muon(1e-3),
}


def start():
    rng = np.random.default_rng(0)
    shapes = {"w1": (16, 32), "b1": (32,), "w2": (32, 4)}
    return {k: jnp.asarray(rng.normal(size=s) / 4, jnp.bfloat16) for k, s in shapes.items()}


def loss_fn(params, x):
    p = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    target = jnp.sin(x @ jnp.linspace(-1, 1, 64).reshape(16, 4))
    return jnp.mean((jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] - target) ** 2)


def nearest_away(master):
    """The nearest bfloat16, ties away from zero: the carry of an addition to the magnitude."""
    bits = (jax.lax.bitcast_convert_type(master, jnp.uint32) + 0x8000) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


@functools.cache
def by_hand(name, steps):
    """float32 parameters, the model computed on their nearest bfloat16, Optax as its page says."""
    optimizer = OPTIMIZERS[name]()

    def step(carry, x):
        master, state, ties = carry
        grads = jax.grad(loss_fn)(jax.tree.map(nearest_away, master), x)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        updates, state = optimizer.update(grads, state, master)
        low = [jax.lax.bitcast_convert_type(m, jnp.uint32) & 0xFFFF for m in master.values()]
        ties += sum(jnp.sum(x == 0x8000) for x in low)
        return (optax.apply_updates(master, updates), state, ties), None

    master = jax.tree.map(lambda p: p.astype(jnp.float32), start())
    carry = (master, optimizer.init(master), jnp.int32(0))
    (master, state, ties), _ = jax.jit(functools.partial(jax.lax.scan, step))(carry, data(steps))
    return master, state, int(ties)


def data(steps):
    return jnp.asarray(np.random.default_rng(1).normal(size=(steps, 8, 16)), jnp.float32)


@pytest.mark.parametrize("way", [jt.optim.bf16_remainder, slow(jt.optim.master_weights)])
@pytest.mark.parametrize(
    "name", ["adamw", *(pytest.param(n, marks=pytest.mark.slow) for n in list(OPTIMIZERS)[1:])]
)
@pytest.mark.slow
def test_a_thousand_steps_are_those_of_float32_parameters_bit_for_bit(name, way):
    steps = 1000
    master, inner, ties = by_hand(name, steps)
    if name == "adamw":
        assert ties > 0  # the case that a remainder can lose did come up
    stepper = jt.make_step(loss_fn, way(OPTIMIZERS[name]()), "bf16", cast_batch=False)
    state, info = stepper.scan(stepper.init(start()), data(steps))
    assert info.loss[-10:].mean() < info.loss[:10].mean()
    ours = state.opt_state[1]
    if way is jt.optim.bf16_remainder:
        ours = jax.tree.map(jt.numerics.join_bf16_remainder, state.params, ours)
    assert_same_bits(ours, master)
    assert_same_bits(state.opt_state.inner, inner)
    assert_same_bits(state.params, jax.tree.map(nearest_away, master))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_gradients_give_the_bits_of_the_float32_optimizer(name):
    """Optax on float32 parameters, as its own page says, with the same gradients for both. Operation by
    operation: in two programs XLA may fuse products with sums differently."""
    optimizer, ours = OPTIMIZERS[name](), jt.optim.bf16_remainder(OPTIMIZERS[name]())

    def step(carry, grads):
        updates, state = optimizer.update(grads, carry[1], carry[0])
        return optax.apply_updates(carry[0], updates), state

    def our_step(carry, grads):
        updates, state = ours.update(grads, carry[1], carry[0])
        return optax.apply_updates(carry[0], updates), state

    full = jax.tree.map(lambda p: p.astype(jnp.float32), start())
    carry, our_carry = (full, optimizer.init(full)), (start(), ours.init(start()))
    rng = np.random.default_rng(2)
    for _ in range(4 if name == "muon" else 50):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), full)
        carry, our_carry = step(carry, grads), our_step(our_carry, grads)
    joined = jax.tree.map(jt.numerics.join_bf16_remainder, our_carry[0], our_carry[1].remainder)
    assert_same_bits((joined, our_carry[1].inner), carry)


@pytest.mark.slow
def test_mixed_bfloat16_differs_first_where_a_cast_breaks_a_tie():
    """Its cast takes ties to even. The two trainings agree in every bit until a float32 parameter lies
    halfway between an even bfloat16 and a larger odd one; at that step the losses' weights differ.
    Operation by operation: in two programs XLA may fuse products with sums differently."""
    steppers = (
        jt.make_step(
            loss_fn, jt.optim.bf16_remainder(OPTIMIZERS["adamw"]()), "p=bf16,c=bf16,o=f32"
        ),
        jt.make_step(loss_fn, OPTIMIZERS["adamw"](), "mixed_bfloat16"),
    )
    narrow, mixed = (stepper.init(start()) for stepper in steppers)
    for step, x in enumerate(data(400)):
        bits = [np.asarray(p).view(np.uint32) for p in jax.tree.leaves(mixed.params)]
        tie = any(((b & 0x1FFFF) == 0x8000).any() for b in bits)
        with jax.disable_jit():
            narrow, _ = steppers[0].pure_step(narrow, x)
            mixed, _ = steppers[1].pure_step(mixed, x)
        joined = jax.tree.map(
            jt.numerics.join_bf16_remainder, narrow.params, narrow.opt_state.remainder
        )
        if tie:
            break
        assert_same_bits((joined, narrow.opt_state.inner), (mixed.params, mixed.opt_state))
    assert tie and step > 10
    with pytest.raises(AssertionError):
        assert_same_bits(joined, mixed.params)
