"""The operations of RandAugment on an image of 8 bits, by Pillow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

LARGEST = 30
"""The largest magnitude."""


def operations(magnitude: int, width: int, height: int, sign: int) -> dict[str, Callable[..., Any]]:
    """Return the operations by name, each a function of an image of Pillow, grey or RGB.

    Args:
      magnitude: 0 to 30, as in torchvision.
      width, height: of the image, in pixels.
      sign: 1 or -1: the direction of a shift or turn, and whether an enhancement is more or less.

    Raises:
      ImportError: without Pillow.

    Source: Cubuk et al. 2019, "RandAugment", arXiv:1909.13719; the ranges are those of torchvision's
    `RandAugment`.
    """
    from PIL import ImageEnhance, ImageOps

    share = magnitude / LARGEST
    signed = share * sign
    enhanced: Callable[[Any], Any] = lambda kind: (
        lambda image: kind(image).enhance(1 + 0.9 * signed)
    )
    moved: Callable[..., Any] = lambda *matrix: lambda image: _affine(image, matrix)
    return {
        "identity": lambda image: image,
        "autocontrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
        "rotate": lambda image: image.rotate(30 * signed),
        "solarize": lambda image: ImageOps.solarize(image, round(255 * (1 - share))),
        "color": enhanced(ImageEnhance.Color),
        "posterize": lambda image: ImageOps.posterize(image, 8 - round(4 * share)),
        "contrast": enhanced(ImageEnhance.Contrast),
        "brightness": enhanced(ImageEnhance.Brightness),
        "sharpness": enhanced(ImageEnhance.Sharpness),
        "shear_x": moved(1, -0.3 * signed, 0, 0, 1, 0),
        "shear_y": moved(1, 0, 0, -0.3 * signed, 1, 0),
        "translate_x": moved(1, 0, -150 / 331 * width * signed, 0, 1, 0),
        "translate_y": moved(1, 0, 0, 0, 1, -150 / 331 * height * signed),
    }


NAMES = (
    *("identity", "autocontrast", "equalize", "rotate", "solarize", "color", "posterize"),
    *("contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
)
_MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def operated(images: np.ndarray, rng: np.random.Generator, count: int, magnitude: int) -> Any:
    """Return images after `count` random operations each.

    Args:
      images: uint8, (batch, height, width, 1, 3 or 4). The fourth channel, alpha, is moved with the
        others and else unchanged.
      rng: gives each image its operations and their signs.
      count: number of operations.
      magnitude: as for `operations`.
    """
    chosen = rng.integers(0, len(NAMES), (len(images), count))
    signs = rng.choice((-1, 1), (len(images), count))
    changed = np.empty_like(images)
    for index, image in enumerate(images):
        for name, sign in zip(chosen[index], signs[index], strict=True):
            image = operate(image, NAMES[name], magnitude, int(sign))
        changed[index] = image
    return changed


def operate(image: np.ndarray, name: str, magnitude: int, sign: int) -> np.ndarray:
    """Return an image, uint8 (height, width, 1, 3 or 4), after one operation.

    >>> operate(np.full((1, 1, 1), 200, np.uint8), "solarize", 30, 1).tolist()
    [[[55]]]
    """
    from PIL import Image

    height, width, channels = image.shape
    run = operations(magnitude, width, height, sign)[name]
    colours = image[..., :3] if channels == 4 else image
    planes = [colours[..., 0] if channels == 1 else colours]
    planes += [image[..., 3]] if channels == 4 and name in _MOVES else []
    done = [np.asarray(run(Image.fromarray(np.ascontiguousarray(x)))) for x in planes]
    done = [x.reshape(height, width, -1) for x in done]
    if channels == 4 and name not in _MOVES:
        done.append(image[..., 3:])
    return np.concatenate(done, -1)


def _affine(image: Any, matrix: tuple[float, ...]) -> Any:
    from PIL import Image

    return image.transform(image.size, Image.Transform.AFFINE, matrix)
