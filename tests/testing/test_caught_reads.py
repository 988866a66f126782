"""`assert_no_host_sync` of functions that catch the error of a read."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmp_train.testing import assert_no_host_sync

X = np.ones((3,), np.float32)
READS = {
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "complex": lambda x: complex(x[0]),
    "index": lambda x: [1, 2][x[0].astype(int)],
    "asarray": lambda x: np.asarray(x),
    "numpy": lambda x: np.linalg.norm(x),
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_read_whose_error_is_caught_is_found(name, wrap):
    def caught(x):
        with contextlib.suppress(Exception):
            READS[name](x)
        return 2 * x

    with pytest.raises(AssertionError, match="expected no read of an array on the host") as error:
        assert_no_host_sync(wrap(caught), X)
    line = READS[name].__code__.co_firstlineno
    assert f"{__file__}:{line} (<lambda>)" in str(error.value)


def test_what_packages_try_is_not_found():
    """JAX tries whether the bounds of a loop have values."""

    def loops(x):
        count = x[0].astype(int)
        return jax.lax.fori_loop(0, count, lambda i, c: c + i, jnp.take(x, 0))

    assert_no_host_sync(loops, X)
