"""Colours of images, floating from 0 to 1: brightness, contrast, saturation and hue."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of ITU-R BT.601


def luma(images: np.ndarray) -> np.ndarray:
    """Return the brightness of pixels, (..., 1), from their channels, (..., 1) or (..., 3)."""
    return images if images.shape[-1] == 1 else (images @ _LUMA.astype(images.dtype))[..., None]


def with_brightness(images: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Return images times a factor each; 0 is black, 1 changes nothing."""
    return (images * _of_each(factor, images)).clip(0, 1)


def with_contrast(images: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Return images whose differences from their mean luma are multiplied by a factor each."""
    mean = luma(images).mean((1, 2, 3), keepdims=True)
    return _blend(mean, images, factor)


def with_saturation(images: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Return images whose differences from their luma are multiplied by a factor each; 0 is grey."""
    return images if images.shape[-1] == 1 else _blend(luma(images), images, factor)


def with_hue(images: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Return images whose hue is turned around the circle of colours by a share of it each."""
    if images.shape[-1] == 1:
        return images
    red, green, blue = np.moveaxis(images, -1, 0)
    value, least = images.max(-1), images.min(-1)
    spread = value - least
    divisor = np.where(spread == 0, 1, spread)
    hue = np.where(
        value == red,
        (green - blue) / divisor,
        np.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + 6 * turn.astype(images.dtype)[:, None, None]
    # Smith 1978, in the form f(n) = value - spread * max(0, min(k, 4 - k, 1)), k = (n + hue) mod 6.
    k = (np.array([5, 3, 1], images.dtype) + hue[..., None]) % 6
    return value[..., None] - spread[..., None] * np.minimum(k, 4 - k).clip(0, 1)


#: In the order of the arguments of `color_jitter`.
CHANGES: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
    with_brightness,
    with_contrast,
    with_saturation,
    with_hue,
)


def jittered(
    images: np.ndarray, rng: np.random.Generator, ranges: tuple[tuple[float, float], ...]
) -> np.ndarray:
    """Return images with each of `CHANGES`, in a random order and by random amounts for each image.

    Args:
      images: floating, (batch, height, width, 1, 3 or 4); the fourth channel, alpha, is unchanged.
      rng: gives each image its order and amounts.
      ranges: the least and the largest amount of each change.
    """
    changed, count = images.copy(), len(images)
    colours = changed[..., :3]
    low, high = np.array(ranges).T
    amounts = rng.uniform(low, high, (count, len(CHANGES)))
    order = rng.permuted(np.tile(np.arange(len(CHANGES)), (count, 1)), axis=1)
    for place in order.T:
        for number, change in enumerate(CHANGES):
            rows = np.flatnonzero(place == number)
            if rows.size and (low[number], high[number]) != _NOTHING[number]:
                colours[rows] = change(colours[rows], amounts[rows, number])
    return changed


_NOTHING = ((1, 1), (1, 1), (1, 1), (0, 0))  # the amounts that change nothing


def _blend(base: np.ndarray, images: np.ndarray, factor: np.ndarray) -> np.ndarray:
    return (base + _of_each(factor, images) * (images - base)).clip(0, 1)


def _of_each(factor: np.ndarray, images: np.ndarray) -> np.ndarray:
    return factor.astype(images.dtype)[:, None, None, None]
