"""Arrays for tests, and comparing them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

BF16_EPS = 2.0**-8  # half an ulp of bfloat16 is 2**-9 relative; operand and result are rounded
F32_EPS = 2.0**-23


def rounded(shape, seed=0, low=-2.0, high=2.0):
    """Return float32 numbers that bfloat16 represents exactly: a cast to it loses nothing."""
    x = np.random.default_rng(seed).uniform(low, high, shape)
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def through(x, dtype=jnp.bfloat16):
    """Round float32 numbers to a narrower dtype, with casts that the compiler for GPUs cannot leave out."""
    return jax.lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)


def through_product(op):
    """Return `op` of a product with the identity: a half-precision array with the values of x."""
    return lambda x, *rest: op(x @ jnp.eye(x.shape[-1]), *rest)
