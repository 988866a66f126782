"""Batch normalisation with the statistics of each device's share of a batch."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jmp_train.numerics.dtypes import at_least_float32
from jmp_train.sharding.mesh import BATCH_AXES
from jmp_train.sharding.sharded import batch_shards


class ShareBatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` that normalises each share of a batch by its own mean and variance.

    On a mesh, a share is what the devices of one place on `data` and `fsdp` take of a batch, or of a
    micro-batch, so that normalisation needs no other device. Running averages are those of the means
    over the shares of their means and variances: devices exchange two numbers per feature for them, which
    nothing in the step waits for. Without a mesh, and in evaluation, it is `nnx.BatchNorm`, whose
    arguments and variables it has.

    Statistics are float32, or float64 for features in float64; the result has the dtype that
    `nnx.BatchNorm` returns.

    Raises:
      ValueError: for a batch that the shares do not divide.

    >>> norm = ShareBatchNorm(3, rngs=nnx.Rngs(0))
    >>> norm(jnp.ones((2, 3))).shape
    (2, 3)
    """

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalise features (batch, ...); `mask`, bool, broadcasts to them and excludes values."""
        given = self.use_running_average if use_running_average is None else use_running_average
        shares = batch_shards()
        if given is None or given or shares == 1:
            return super().__call__(x, use_running_average, mask=mask)
        if len(x) % shares:
            raise ValueError(
                f"a batch norm got {len(x)} examples, and the mesh has {shares} shares of a batch; "
                f"expected a multiple of {shares}"
            )
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        promoted = self.promote_dtype(
            (x, self.mean[...], self.var[...], scale, bias), dtype=self.dtype
        )
        own = self.axis if isinstance(self.axis, tuple | list) else (self.axis,)
        features = {axis % x.ndim for axis in own}
        shape = [n if i in features else 1 for i, n in enumerate(x.shape)]
        y, means, variances = _normalised(
            _in_shares(promoted[0], shares),
            None if mask is None else _in_shares(jnp.broadcast_to(mask, x.shape), shares),
            tuple(i + 1 for i in range(x.ndim) if i not in features),
            scale=None if promoted[3] is None else promoted[3].reshape(shape),
            bias=None if promoted[4] is None else promoted[4].reshape(shape),
            epsilon=self.epsilon,
            fast=self.use_fast_variance,
        )
        for average, values in ((self.mean, means), (self.var, variances)):
            new = jax.lax.stop_gradient(values.mean(0).reshape(average.shape))
            average[...] = self.momentum * average[...] + (1 - self.momentum) * new
        given = [v for v in (promoted[0], *promoted[3:]) if v is not None]
        dtype = jnp.result_type(*given) if self.dtype is None else self.dtype
        return y.reshape(x.shape).astype(dtype)


def _in_shares(x: jax.Array, shares: int) -> jax.Array:
    """Return a batch with an axis of shares before it, each on its devices."""
    x = x.reshape(shares, -1, *x.shape[1:])
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES))


def _normalised(
    x: jax.Array,
    mask: jax.Array | None,
    axes: tuple[int, ...],
    *,
    scale: jax.Array | None,
    bias: jax.Array | None,
    epsilon: float,
    fast: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return normalised shares (shares, batch, ...), and the mean and the variance of each.

    Args:
      x: the shares.
      mask: which values count; None: all.
      axes: the axes that means are over.
      scale: factors, of a shape that broadcasts; None: 1.
      bias: added at the end, likewise; None: 0.
      epsilon: added to a variance.
      fast: whether a variance is the mean square less the squared mean, in one pass.
    """
    wide = x.astype(at_least_float32(x.dtype))
    mean = lambda v: v.mean(axes, keepdims=True, where=mask)
    mu = mean(wide)
    if fast:
        var = jnp.maximum(mean(jnp.square(wide)) - jnp.square(mu), 0.0)
    else:
        var = mean(jnp.square(wide - mu))
    factor = jax.lax.rsqrt(var + epsilon)
    y = (x - mu) * (factor if scale is None else factor * scale)
    y = y if bias is None else y + bias
    count = math.prod(n for i, n in enumerate(mu.shape) if i)
    return y, mu.reshape(len(mu), count), var.reshape(len(var), count)
