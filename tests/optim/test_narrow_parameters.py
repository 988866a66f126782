"""An update of bit patterns reaches every value, where a float32 one cannot; refused dtypes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from helpers.bits import bits, every_pattern, unsigned
from helpers.marks import first_quick

import jmp_train as jt
from jmp_train.optim import BitUpdate

WAYS = (
    jt.optim.master_weights,
    jt.optim.bf16_remainder,
    jt.optim.stochastic_rounding,
    jt.optim.kahan,
)
DTYPES = (ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_updates_reaches_every_pattern_from_every_other(dtype, jit):
    """All pairs in 8 bits; in 16 bits all patterns, each paired with 16 others. NaN and signed zero
    are patterns like any other."""
    every = every_pattern(dtype)
    rng = np.random.default_rng(0)
    others = every if every.dtype == np.uint8 else rng.integers(0, 2**16, 16).astype(np.uint16)
    old = np.broadcast_to(every, (len(others), len(every))).view(dtype)
    new = (every + others[:, None]).astype(unsigned(dtype)).view(dtype)

    def go(old, new):
        return optax.apply_updates({"w": old}, {"w": BitUpdate.between(old, new)})["w"]

    got = (jax.jit(go) if jit else go)(jnp.asarray(old), jnp.asarray(new))
    assert got.dtype == dtype
    np.testing.assert_array_equal(bits(got), bits(new))


def test_no_float32_update_would_reach_them():
    """Why updates are not differences: from 1 to 2^-30 there is none, near -1 or anywhere."""
    old, new = np.float32(1), np.float32(2.0**-30)
    update = np.float32(np.float64(new) - np.float64(old))
    lower, higher = (np.nextafter(update, np.float32(end)) for end in (-2, 0))
    reached = {float((old + u).astype(ml_dtypes.bfloat16)) for u in (lower, update, higher)}
    assert reached == {-(2.0**-23), 0.0, 2.0**-24}
    moved = jnp.bfloat16(1) + BitUpdate.between(jnp.bfloat16(1), jnp.bfloat16(2.0**-30))
    assert float(moved) == 2.0**-30


@pytest.mark.parametrize("way", WAYS)
def test_a_parameter_that_falls_to_almost_nothing_arrives_there(way):
    """A float32 difference would leave 0. The gradient takes 1 to 2^-20, which 24 bits hold."""
    params = jnp.ones(3, jnp.bfloat16)
    optimizer = way(optax.sgd(1.0))
    grads = jnp.full(3, 1 - 2.0**-20)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_array_equal(np.asarray(optax.apply_updates(params, updates)), 2.0**-20)


def test_zero_updates_leave_numpy_and_jax_parameters_unchanged():
    update = BitUpdate.between(jnp.zeros(2, jnp.bfloat16), jnp.ones(2, jnp.bfloat16))
    zero = jax.tree.map(jnp.zeros_like, update)
    for params in (np.array([-0.0, 3], ml_dtypes.bfloat16), jnp.array([-0.0, 3], jnp.bfloat16)):
        for sum_ in (params + zero, zero + params):
            np.testing.assert_array_equal(bits(sum_), bits(params))
    numpy_zeros = np.zeros(2, ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(numpy_zeros + update, np.float32), 1)


@pytest.mark.parametrize("outer", [optax.scale(0.5), optax.scale_by_learning_rate(0.1)])
def test_a_transformation_that_changes_updates_outside_is_refused(outer):
    params = jnp.ones(2, jnp.bfloat16)
    optimizer = optax.chain(jt.optim.master_weights(optax.sgd(1.0)), outer)
    updates, _ = optimizer.update(jnp.ones(2), optimizer.init(params), params)
    with pytest.raises(TypeError, match="holds float32; expected the uint16"):
        optax.apply_updates(params, updates)


@pytest.mark.parametrize("way", WAYS)
def test_parameters_that_are_not_narrow_are_refused_by_their_dtype(way):
    with pytest.raises(ValueError, match=f"{way.__name__}: the parameters are float32; expected"):
        way(optax.adam(0.1)).init({"w": jnp.ones(2)})


@pytest.mark.parametrize("way", WAYS)
def test_optax_maps_over_what_the_state_holds_for_each_parameter(way):
    """For the sharding of a state, say: `optax.tree.map_params` inits with a tree without leaves."""
    params = {"a": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16)}
    specs = {"a": "sharded", "b": "whole"}
    optimizer = jt.optim.loss_scaling(way(optax.adam(0.1)))
    state = optimizer.init(params)
    mapped = optax.tree.map_params(optimizer, lambda _, spec: spec, state, specs)
    shapes = {"sharded": (3, 2), "whole": (2,)}
    pairs = list(zip(jax.tree.leaves(mapped), jax.tree.leaves(state), strict=True))
    found = [word for word, x in pairs if isinstance(word, str) and x.shape == shapes[word]]
    copies = (
        2 if way is jt.optim.stochastic_rounding else 3
    )  # two moments, and what the wrapper keeps
    assert sorted(found) == ["sharded"] * copies + ["whole"] * copies


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float8_e5m2])
def test_the_remainder_is_for_bfloat16_alone(dtype):
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": {"c": jnp.ones(2, dtype)}}
    message = f"parameter 'b/c' is {jnp.dtype(dtype)}; expected bfloat16"
    with pytest.raises(ValueError, match=message):
        jt.optim.bf16_remainder(optax.adam(0.1)).init(params)


def test_a_format_that_cannot_be_rounded_to_is_refused():
    with pytest.raises(ValueError, match="'w' is float8_e4m3fnuz; expected bfloat16 or float16"):
        jt.optim.kahan(optax.sgd(0.1)).init({"w": jnp.ones(2, jnp.float8_e4m3fnuz)})


@pytest.mark.parametrize("way", WAYS)
def test_an_update_without_parameters_is_refused(way):
    params = jnp.ones(2, jnp.bfloat16)
    optimizer = way(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"expected update\(updates, state, params\)"):
        optimizer.update(params, optimizer.init(params))


@pytest.mark.parametrize("way", WAYS)
def test_a_chain_around_it_in_make_step_says_where_it_belongs(way):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), way(optax.sgd(0.1)))
    stepper = jt.make_step(lambda params, batch: params.sum(), optimizer, "bf16")
    with pytest.raises(ValueError, match="must be the outermost transformation"):
        stepper.init(jnp.ones(2))


@pytest.mark.parametrize("dtype", first_quick(DTYPES))
@pytest.mark.parametrize("way", WAYS)
def test_float32_parameters_beside_narrow_ones_are_the_inner_optimizers(way, dtype):
    if way is jt.optim.bf16_remainder and dtype is not ml_dtypes.bfloat16:
        return
    start = np.linspace(0.5, 1.5, 8)
    params = {"w": jnp.asarray(start, dtype), "norm": jnp.asarray(start, jnp.float32), "no": None}
    alone = params["norm"]
    optimizer, inner = way(optax.sgd(0.01, 0.9)), optax.sgd(0.01, 0.9)
    state, inner_state = optimizer.init(params), inner.init(alone)
    for n in range(5):
        grads = {"w": params["w"], "norm": jnp.cos(alone + n), "no": None}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, inner_state = inner.update(jnp.cos(alone + n), inner_state, alone)
        alone = optax.apply_updates(alone, updates)
    np.testing.assert_array_equal(params["norm"], alone)
    assert params["norm"].dtype == jnp.float32 and params["w"].dtype == dtype
    assert state[1]["norm"] is None if isinstance(state[1], dict) else True
    assert (np.asarray(params["w"], np.float64) != start.astype(dtype).astype(np.float64)).any()
