"""Comparisons with float64 on two devices; test_several_devices.py runs this file in a process with them."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jmp_train.testing import (
    assert_close_to_float64,
    assert_contractions_in,
    assert_gradients_close,
    assert_no_overflow,
)

X = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)


def by_columns(kind=AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    return mesh, jax.device_put(X, NamedSharding(mesh, P(None, "d")))


def test_explicit_sharding_of_arguments_is_kept():
    mesh, x = by_columns()
    by_rows = lambda x: jax.sharding.reshard(x, NamedSharding(mesh, P("d")))
    assert_close_to_float64(lambda x: by_rows(x) * 3, x, ulps=1)
    assert_no_overflow(lambda x: by_rows(x) * 3, x, dtype=None)
    with pytest.raises(AssertionError, match="Worst operation: convert_element_type in bfloat16"):
        assert_close_to_float64(lambda x: by_rows(x.astype(jnp.bfloat16)), x, rtol=1e-6)
    loss = lambda w, x: jnp.mean((by_rows(x) * w).astype(jnp.float32))
    assert_gradients_close(loss, X, x, policy="mixed_bfloat16")


def test_arguments_on_another_device_stay_there():
    x = jax.device_put(X, jax.devices()[1])
    assert_close_to_float64(lambda y: y * x, x, ulps=1)


def test_arguments_of_an_automatic_mesh_are_taken():
    _, x = by_columns(AxisType.Auto)
    assert_close_to_float64(lambda x: x @ x, x, ulps=16)


def test_a_function_exported_for_several_devices_is_one_operation():
    _, x = by_columns(AxisType.Auto)
    call = jax.export.export(jax.jit(jnp.sin, in_shardings=x.sharding))(x).call
    assert_contractions_in(lambda x: call(x @ x), x, dtype="float32")
