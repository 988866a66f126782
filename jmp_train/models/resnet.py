"""A residual network with batch normalisation, written without regard to precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jmp_train.models.batch_norm import ShareBatchNorm


class _Shape(NamedTuple):
    """Blocks of each stage, the width of the first, and whether blocks are bottlenecks."""

    blocks: tuple[int, ...]
    width: int
    bottleneck: bool = False


SIZES = {
    "tiny": _Shape((1, 1, 1), 16),
    "18": _Shape((2, 2, 2, 2), 64),
    "50": _Shape((3, 4, 6, 3), 64, bottleneck=True),
}


NORMS: dict[str, type[nnx.BatchNorm]] = {"global": nnx.BatchNorm, "device": ShareBatchNorm}


class Residual(nnx.Module):
    """Two 3 x 3 convolutions, or three with a bottleneck, added to their input.

    The last batch norm begins with a scale of 0, so that a block begins as its shortcut.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        bottleneck: bool,
        norm: Callable[..., nnx.BatchNorm],
        *,
        rngs: nnx.Rngs,
    ):
        outputs = 4 * width if bottleneck else width
        conv = partial(_conv, rngs=rngs)
        if bottleneck:
            parts = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            parts = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        self.convs = nnx.List(conv(*part) for part in parts)
        last = len(parts) - 1
        self.norms = nnx.List(
            norm(part[1], zero=index == last, rngs=rngs) for index, part in enumerate(parts)
        )
        changes = stride != 1 or inputs != outputs
        self.shortcut = conv(inputs, outputs, 1, stride) if changes else None
        self.shortcut_norm = norm(outputs, rngs=rngs) if changes else None

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        y_BxHxWxC = x_BxHxWxC
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y_BxHxWxC = norm(conv(nnx.relu(y_BxHxWxC) if index else y_BxHxWxC))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x_BxHxWxC = self.shortcut_norm(self.shortcut(x_BxHxWxC))
        return nnx.relu(x_BxHxWxC + y_BxHxWxC)


class ResNet(nnx.Module):
    """A residual network for images (He et al. 2015, arXiv:1512.03385).

    Args:
      channels: channels of an image.
      classes: number of outputs.
      size: "tiny" (3 blocks, 16 to 64 features), "18" or "50", with the blocks of the paper.
      reduce: factor by which the first layers reduce height and width: 1 or 2 with a 3 x 3 convolution,
        4 with one of 7 x 7 and a pooling, as in the paper, for images of 224 pixels.
      statistics: what batch norms normalise by on several devices: the statistics of the whole batch
        ("global"), or of the share of each device ("device"), which they need not wait for.
      rngs: random streams of the initial parameters.

    Raises:
      ValueError: for an unknown size, factor or kind of statistics.

    >>> ResNet(1, 10, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 1))).shape
    (2, 10)
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        size: Literal["tiny", "18", "50"] = "tiny",
        reduce: Literal[1, 2, 4] = 1,
        statistics: Literal["global", "device"] = "global",
        *,
        rngs: nnx.Rngs,
    ):
        if size not in SIZES:
            raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
        if reduce not in (1, 2, 4):
            raise ValueError(f"reduce is {reduce}; expected 1, 2 or 4")
        if statistics not in NORMS:
            raise ValueError(f"statistics is {statistics!r}; expected one of {', '.join(NORMS)}")
        shape, norm = SIZES[size], partial(_norm, NORMS[statistics])
        self.pools = reduce == 4
        kernel, stride = {1: (3, 1), 2: (3, 2), 4: (7, 2)}[reduce]
        self.stem = _conv(channels, shape.width, kernel, stride, rngs=rngs)
        self.stem_norm = norm(shape.width, rngs=rngs)
        blocks, inputs = [], shape.width
        for stage, count in enumerate(shape.blocks):
            width = shape.width * 2**stage
            for index in range(count):
                stride = 2 if stage and not index else 1
                blocks.append(Residual(inputs, width, stride, shape.bottleneck, norm, rngs=rngs))
                inputs = 4 * width if shape.bottleneck else width
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """Map images, (batch, height, width, channels) or without channels, to (batch, classes)."""
        x_BxHxWxC = image[..., None] if image.ndim == 3 else image
        x_BxHxWxC = nnx.relu(self.stem_norm(self.stem(x_BxHxWxC)))
        if self.pools:
            x_BxHxWxC = nnx.max_pool(x_BxHxWxC, (3, 3), (2, 2), "SAME")
        for block in self.blocks:
            x_BxHxWxC = block(x_BxHxWxC)
        return self.head(jnp.mean(x_BxHxWxC, axis=(1, 2)))


def _conv(inputs: int, outputs: int, kernel: int, stride: int, *, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        outputs,
        (kernel, kernel),
        strides=stride,
        use_bias=False,  # the batch norm after it has one
        kernel_init=nnx.initializers.he_normal(),
        rngs=rngs,
    )


def _norm(
    kind: type[nnx.BatchNorm], features: int, *, zero: bool = False, rngs: nnx.Rngs
) -> nnx.BatchNorm:
    scale: Callable[..., jax.Array] = (
        nnx.initializers.zeros_init() if zero else nnx.initializers.ones_init()
    )
    return kind(features, momentum=0.9, scale_init=scale, rngs=rngs)
