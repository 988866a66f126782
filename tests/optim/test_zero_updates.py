"""A zero update leaves every narrow parameter as it is, subnormals included, on every device."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from helpers.bits import bits, every_pattern
from helpers.marks import slow

import jmp_train as jt

WAYS = (
    jt.optim.master_weights,
    jt.optim.bf16_remainder,
    jt.optim.stochastic_rounding,
    jt.optim.kahan,
)
DTYPES = (ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


@pytest.mark.parametrize("steps", [3, slow(1)])
@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("dtype", [*DTYPES[:2], *map(slow, DTYPES[2:])])
@pytest.mark.parametrize("way", WAYS)
def test_a_zero_update_keeps_every_pattern(way, dtype, zero, steps):
    """All patterns of a format. -0 + 0 is +0 as in IEEE 754; a NaN stays one, perhaps another."""
    if way is jt.optim.bf16_remainder and dtype is not ml_dtypes.bfloat16:
        return
    before = every_pattern(dtype)
    params = jnp.asarray(before.view(dtype))
    optimizer = way(optax.identity())
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    for _ in range(steps):
        updates, state = step(jnp.full(params.shape, zero, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
    after = np.asarray(params)
    number = before.view(dtype).astype(np.float32)
    added = zero + 0.0 if way is jt.optim.kahan else zero  # its compensation, +0, is added first
    is_zero, nan = number == 0, np.isnan(number)
    number[is_zero] += np.float32(added)
    assert np.isnan(after[nan].astype(np.float32)).all()
    np.testing.assert_array_equal(
        after[~nan].view(before.dtype), number[~nan].astype(dtype).view(before.dtype)
    )


def test_a_zero_update_keeps_a_subnormal_compensation():
    """Half a spacing at 2^-118 is the subnormal 2^-126; a half of that waits for the other half."""
    value, rest = jnp.bfloat16(2.0**-118), jnp.bfloat16(2.0**-127)
    new, lost = jax.jit(jt.numerics.kahan_add)(value, rest, jnp.float32(0))
    assert bits(new) == bits(value)
    assert bits(lost) == bits(rest)


@pytest.mark.parametrize("way", WAYS)
def test_float64_updates_are_taken_and_rounded_to_float32(way):
    """1/3 in float64 and its nearest float32 move a parameter and what is kept beside it alike."""
    params = jnp.ones(4, jnp.bfloat16)
    optimizer = way(optax.identity())
    with jax.enable_x64(True):
        wide = jnp.full(4, 1 / 3, jnp.float64)
        updates, state = jax.jit(optimizer.update)(wide, optimizer.init(params), params)
        after = optax.apply_updates(params, updates)
        narrow = jnp.full(4, np.float32(1 / 3), jnp.float32)
        other, other_state = jax.jit(optimizer.update)(narrow, optimizer.init(params), params)
        other = optax.apply_updates(params, other)
    assert wide.dtype == jnp.float64 and after.dtype == jnp.bfloat16
    for a, b in zip(jax.tree.leaves((after, state)), jax.tree.leaves((other, other_state)), strict=True):  # fmt: skip
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert np.abs(np.asarray(after, np.float64) - 4 / 3).max() <= 2.0**-7  # a spacing
