"""Mixup and CutMix: each example of a batch mixed with another one of it, inside the training step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jmp_train.numerics.dtypes import at_least_float32
from jmp_train.tasks.masks import check_mask
from jmp_train.types import Batch, Key

_STREAM = 0x6D6978  # apart from the keys of dropout, which are folds of small numbers or of a path


class Mixture(NamedTuple):
    """How a batch is mixed with a permutation of itself."""

    partner: jax.Array
    """Index of the example that each is mixed with; int32 (batch,)."""
    share: jax.Array
    """Share of the first of each two; float32 ()."""
    kept: jax.Array
    """Share of the first at each pixel, float32: (), or (height, width) with 1 outside the rectangle
    that CutMix replaces and 0 inside."""


def draw_mixture(
    key: Key,
    shape: tuple[int, ...],
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    mask: jax.Array | None = None,
) -> Mixture:
    """Draw how a batch is mixed: one share for all of its examples, as in the papers.

    The share is of Beta(alpha, alpha) for mixup. CutMix replaces a rectangle with the shape of the
    image and the share 1 - lambda of its area, lambda of Beta(alpha, alpha), around a uniform place;
    the rectangle is cut at the edges, and the share is that of the area that is left. With both, one
    of the two is drawn with equal probability.

    Args:
      key: PRNG key.
      shape: of the inputs: (batch, ...), or (batch, height, width, ...) for CutMix.
      mixup: alpha of mixup; 0 for none.
      cutmix: alpha of CutMix; 0 for none.
      mask: bool (batch,); True examples are mixed with each other alone, as are False ones.

    >>> mixture = draw_mixture(jax.random.key(0), (4, 8, 8, 1), cutmix=1.0)
    >>> bool(jnp.isclose(mixture.kept.mean(), mixture.share)), sorted(mixture.partner.tolist())
    (True, [0, 1, 2, 3])

    Source: Zhang et al. 2017, "mixup", arXiv:1710.09412; Yun et al. 2019, "CutMix", arXiv:1905.04899.
    """
    order_key, share_key, place_key, choice_key = jax.random.split(key, 4)
    partner = jax.random.permutation(order_key, jnp.arange(shape[0], dtype=jnp.int32))
    if mask is not None:
        # The n-th of the examples that count is mixed with the n-th of them in the drawn order.
        drawn = partner[jnp.argsort(~mask[partner], stable=True)]
        partner = jnp.zeros_like(partner).at[jnp.argsort(~mask, stable=True)].set(drawn)
    if mixup and cutmix:
        cuts = jax.random.bernoulli(choice_key)
        share = _beta(share_key, jnp.where(cuts, cutmix, mixup))
        kept = _outside_rectangle(place_key, share, shape[1:3])
        share = jnp.where(cuts, kept.mean(), share)
        return Mixture(partner, share, jnp.where(cuts, kept, share))
    share = _beta(share_key, mixup or cutmix)
    if not cutmix:
        return Mixture(partner, share, share)
    kept = _outside_rectangle(place_key, share, shape[1:3])
    return Mixture(partner, kept.mean(), kept)


def mixed_inputs(x: jax.Array, mixture: Mixture) -> jax.Array:
    """Return inputs, (batch, ...), mixed in at least float32 and rounded to their own dtype."""
    kept = mixture.kept.reshape(mixture.kept.shape + (1,) * (x.ndim - 1 - mixture.kept.ndim))
    wide = x.astype(at_least_float32(x.dtype))
    return (kept * wide + (1 - kept) * wide[mixture.partner]).astype(x.dtype)


def mixing(
    inputs: tuple[str, ...], label: str, *, mixup: float = 0.0, cutmix: float = 0.0
) -> Callable[[Batch, Key], Batch]:
    """Return a function that mixes the inputs of a batch, for the field `augment` of a `Task`.

    The label of the larger share stays under its name. The other one has the name "LABEL.other", and
    the larger share, float32 (), "LABEL.share".

    Args:
      inputs: names of the arrays to mix, floating; all get the same partners and share.
      label: name of the labels.
      mixup: alpha of mixup; 0 for none.
      cutmix: alpha of CutMix; 0 for none. It mixes a single array.

    Raises:
      ValueError: for an alpha that is negative or not finite, and for CutMix of several inputs; from
        the function, for inputs that are not floating, or have no height and width for CutMix.
    """
    for name, alpha in {"mixup": mixup, "cutmix": cutmix}.items():
        if not (0 <= alpha and math.isfinite(alpha)):
            raise ValueError(f"{name} is {alpha}; expected 0 or a positive number")
    if cutmix and len(inputs) != 1:
        raise ValueError(
            f"cutmix is {cutmix} and the inputs are {', '.join(inputs)}; expected one input, images"
        )

    def mix(batch: Batch, key: Key) -> Batch:
        arrays = {name: jnp.asarray(batch[name]) for name in inputs}
        for name, x in arrays.items():
            _check(name, x, bool(cutmix))
        first = next(iter(arrays.values()))
        check_mask(batch, first.shape[:1], "the examples")
        mask = batch.get("mask")
        mixture = draw_mixture(
            jax.random.fold_in(key, _STREAM),
            first.shape,
            mixup=mixup,
            cutmix=cutmix,
            mask=None if mask is None else jnp.asarray(mask) != 0,
        )
        one = jnp.asarray(batch[label])
        two = one[mixture.partner]
        larger = mixture.share >= 0.5
        return {
            **batch,
            **{name: mixed_inputs(x, mixture) for name, x in arrays.items()},
            label: jnp.where(larger, one, two),
            f"{label}.other": jnp.where(larger, two, one),
            f"{label}.share": jnp.maximum(mixture.share, 1 - mixture.share),
        }

    return mix


def _check(name: str, x: jax.Array, cutmix: bool) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name!r} has dtype {x.dtype}; expected floating inputs to mix")
    if cutmix and x.ndim < 3:
        raise ValueError(
            f"{name!r} has shape {x.shape}; expected (batch, height, width, ...) for cutmix"
        )


def _beta(key: Key, alpha: float | jax.Array) -> jax.Array:
    return jax.random.beta(key, alpha, alpha, (), jnp.float32)


def _outside_rectangle(key: Key, share: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Return 0 inside a random rectangle with the area 1 - share before it is cut, and 1 outside."""
    inside = jnp.ones((), bool)
    for axis, (length, own) in enumerate(zip(size, jax.random.split(key), strict=True)):
        half = jnp.floor(0.5 * length * jnp.sqrt(1 - share)).astype(jnp.int32)
        middle = jax.random.randint(own, (), 0, length)
        place = jnp.arange(length)
        line = (place >= middle - half) & (place < middle + half)
        inside = inside & (line[:, None] if axis == 0 else line)
    return (~inside).astype(jnp.float32)
