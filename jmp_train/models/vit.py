"""A vision transformer, written without regard to precision."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jmp_train.models.attention import encoder_attention


class _Shape(NamedTuple):
    """Features of a patch, blocks and attention heads."""

    width: int
    depth: int
    heads: int


SIZES = {
    "tiny": _Shape(96, 4, 3),
    "Ti": _Shape(192, 12, 3),
    "S": _Shape(384, 12, 6),
    "B": _Shape(768, 12, 12),
}


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, **_: object) -> jax.Array:
    """Attention as Flax calls it; a function of the module, so that two networks have equal graphs."""
    dtype = jnp.result_type(q, k, v)
    return encoder_attention(q.astype(dtype), k.astype(dtype), v.astype(dtype))


class EncoderBlock(nnx.Module):
    """A pre-norm block: attention, then a perceptron, each dropped for some examples in training."""

    def __init__(self, shape: _Shape, drop: float, *, rngs: nnx.Rngs):
        width = shape.width
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            shape.heads,
            width,
            dropout_rate=0.0,
            decode=False,
            attention_fn=_attend,
            rngs=rngs,
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        # One draw an example: stochastic depth (Huang et al. 2016, arXiv:1603.09382).
        self.drop = nnx.Dropout(drop, broadcast_dims=(1, 2), rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        x_BxTxD = x_BxTxD + self.drop(self.attention(self.norm1(x_BxTxD)))
        # The backward pass computes the GELU again: else its tanh is kept, or float32 copies of float16.
        inner_BxTxF = jax.checkpoint(nnx.gelu)(self.up(self.norm2(x_BxTxD)))
        return x_BxTxD + self.drop(self.down(inner_BxTxF))


class Vit(nnx.Module):
    """A vision transformer (Dosovitskiy et al. 2020, arXiv:2010.11929) that averages its patches.

    With 128 patches or more, attention goes by blocks (`encoder_attention`), by a custom derivative rule for
    reverse mode.

    Args:
      image: shape of an image, (height, width) or (height, width, channels).
      classes: number of outputs.
      size: "tiny" (96 features, 4 blocks), "Ti", "S" or "B", as in the literature.
      patch: height and width of a patch, which divide those of an image.
      drop_path: rate at which the last block is dropped in training; it rises from 0 at the first
        block.
      rngs: random streams of the initial parameters, and of dropped blocks.

    Raises:
      ValueError: for an unknown size, a patch that does not divide an image, or a rate that is not
        possible.

    >>> Vit((8, 8), 10, patch=4, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8))).shape
    (2, 10)
    """

    placement: ClassVar[tuple[str, ...]] = (
        "re:.*/(query|key|value)/kernel=-,tensor,-",
        "re:.*/(query|key|value)/bias=tensor,-",
        "**/attention/out/kernel=tensor,-,-",
        "**/up/kernel=-,tensor",
        "**/up/bias=tensor+fsdp",
        "**/down/kernel=tensor,-",
    )
    """Placement of the parameters on a mesh with an axis `tensor`: each device computes a share of the
    heads and of the inner features. Heads that it does not divide are computed by all."""

    def __init__(
        self,
        image: tuple[int, ...],
        classes: int,
        size: Literal["tiny", "Ti", "S", "B"] = "tiny",
        patch: int = 4,
        drop_path: float = 0.1,
        *,
        rngs: nnx.Rngs,
    ):
        if size not in SIZES:
            raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
        if patch < 1 or image[0] % patch or image[1] % patch:
            raise ValueError(
                f"patch is {patch}; expected a divisor of {image[0]} and {image[1]}, the height and "
                "width of an image"
            )
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path is {drop_path}; expected 0 <= drop_path < 1")
        shape = SIZES[size]
        channels = image[2] if len(image) == 3 else 1
        patches = (image[0] // patch) * (image[1] // patch)
        self.embed = nnx.Conv(
            channels, shape.width, (patch, patch), strides=patch, padding="VALID", rngs=rngs
        )
        place = nnx.initializers.normal(0.02)(rngs.params(), (1, patches, shape.width))
        self.positions = nnx.Param(place)
        last = max(shape.depth - 1, 1)
        self.blocks = nnx.List(
            EncoderBlock(shape, drop_path * index / last, rngs=rngs) for index in range(shape.depth)
        )
        self.norm = nnx.LayerNorm(shape.width, rngs=rngs)
        self.head = nnx.Linear(
            shape.width, classes, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )

    def __call__(self, image: jax.Array) -> jax.Array:
        """Map images, (batch, height, width, channels) or without channels, to (batch, classes)."""
        x_BxHxWxD = self.embed(image[..., None] if image.ndim == 3 else image)
        x_BxTxD = x_BxHxWxD.reshape(len(image), -1, x_BxHxWxD.shape[-1])
        x_BxTxD = x_BxTxD + self.positions[...].astype(x_BxTxD.dtype)
        for block in self.blocks:
            x_BxTxD = block(x_BxTxD)
        return self.head(jnp.mean(self.norm(x_BxTxD), axis=1))
