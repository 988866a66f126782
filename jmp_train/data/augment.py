"""Random changes of images, for `transform` or `batch_transform` of `jmp_train.Data`.

Each function returns a transform of `image`, floating from 0 to 1 or uint8, in a dict: of an example,
(height, width, channels), or of a batch, (batch, height, width, channels). Shape and dtype stay the same,
as do the other arrays. Each image has its own random numbers, a pure function of the seed and the position.
Evaluation leaves the transforms out.
"""

from __future__ import annotations

import dataclasses
import functools
import reprlib
from typing import Any

import numpy as np

from jmp_train.data.examples import takes_generator, with_generator
from jmp_train.errors import DataError, nearest
from jmp_train.pixels.colour import jittered
from jmp_train.pixels.geometry import mirrored, resized_crops, shifted
from jmp_train.pixels.operations import LARGEST, operated
from jmp_train.pixels.transform import ImageTransform, check_number, check_range
from jmp_train.types import Function

_MODES = ("constant", "edge", "reflect")


def random_crop(padding: int = 4, mode: str = "constant") -> Function:
    """Return a transform that pads images and cuts them to their size at a random place.

    Args:
      padding: number of pixels at each edge.
      mode: what the padding is: "constant" (0), "edge" or "reflect", as in `numpy.pad`.

    Raises:
      DataError: for a negative padding or an unknown mode.

    >>> batch = {"image": np.eye(3, dtype=np.float32)[..., None], "label": 1}
    >>> changed = random_crop(padding=1)(batch, np.random.default_rng(0))
    >>> changed["image"].shape, changed["label"]
    ((3, 3, 1), 1)
    """
    check_number("padding", padding, 0, 2**14, int)
    if mode not in _MODES:
        raise DataError(f"mode is {mode!r}; {nearest(str(mode), _MODES)}")
    return ImageTransform(shifted, (padding, mode), "any")


def random_resized_crop(
    scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Function:
    """Return a transform that resamples a random part of each image, bilinearly, to the image's size.

    Args:
      scale: least and largest area of the part, as a share of the image.
      ratio: least and largest width / height of the part.

    Raises:
      DataError: for a range that is not ascending, a scale outside 0 to 1, or a ratio of 0.
    """
    check_range("scale", scale, 0, 1)
    check_range("ratio", ratio, 1e-3, 1e3)
    return ImageTransform(resized_crops, (tuple(scale), tuple(ratio)), "floating")


def random_flip(p: float = 0.5) -> Function:
    """Return a transform that exchanges left and right with a probability of `p`.

    Raises:
      DataError: for a probability outside 0 to 1.
    """
    check_number("p", p, 0, 1)
    return ImageTransform(mirrored, (p,), "any")


def color_jitter(
    brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0
) -> Function:
    """Return a transform that changes the colours of each image, by random amounts in a random order.

    Args:
      brightness, contrast, saturation: each is multiplied by a factor from max(0, 1 - x) to 1 + x.
      hue: the largest turn of the hue in either direction, as a share of the circle; at most 0.5.

    Raises:
      DataError: for a negative number or a hue above 0.5.
    """
    for name, x in {
        "brightness": brightness,
        "contrast": contrast,
        "saturation": saturation,
    }.items():
        check_number(name, x, 0, 1e3)
    check_number("hue", hue, 0, 0.5)
    factors = [(max(0.0, 1.0 - x), 1.0 + x) for x in (brightness, contrast, saturation)]
    return ImageTransform(jittered, ((*factors, (-hue, hue)),), "floating", colours=True)


def rand_augment(operations: int = 2, magnitude: int = 9) -> Function:
    """Return a transform of RandAugment: random operations of a list for each image.

    The list and its ranges are those of torchvision: identity, autocontrast, equalize, rotate, solarize,
    color, posterize, contrast, brightness, sharpness, and shear and translate along x and y, which fill
    with 0. Pillow does them, so images are rounded to 8 bits.

    Args:
      operations: number of operations on an image.
      magnitude: strength of each, 0 to 30.

    Raises:
      DataError: for another magnitude, or a negative number of operations.

    Source: Cubuk et al. 2019, arXiv:1909.13719.
    """
    check_number("operations", operations, 0, 100, int)
    check_number("magnitude", magnitude, 0, LARGEST, int)
    return ImageTransform(operated, (operations, magnitude), "uint8", colours=True)


def chain(*transforms: Function) -> Chain:
    """Return a transform that applies others in turn; evaluation applies those that take no `rng`.

    Args:
      *transforms: of this module, or functions of an example or a batch, with `rng` or without.

    Raises:
      DataError: for a value that cannot be called.

    >>> halved = chain(random_flip(), lambda batch: {**batch, "image": batch["image"] / 2})
    >>> halved({"image": np.ones((2, 2, 1))}, np.random.default_rng(0))["image"].max()
    np.float64(0.5)
    """
    for transform in transforms:
        if not callable(transform):
            raise DataError(f"chain has {reprlib.repr(transform)}; expected functions")
    return Chain(transforms)


@dataclasses.dataclass(frozen=True)
class Chain:
    """Transforms that are applied in turn."""

    transforms: tuple[Function, ...]

    def __call__(self, batch: Any, rng: np.random.Generator) -> Any:
        for transform in self.transforms:
            batch = with_generator(transform)(batch, rng)
        return batch

    @property
    def in_evaluation(self) -> Function | None:
        """The transforms that take no random numbers; None without any."""
        inner = [t.in_evaluation if isinstance(t, Chain) else t for t in self.transforms]
        kept = [t for t in inner if t is not None and not takes_generator(t)]
        return functools.partial(_in_turn, kept) if kept else None


def _in_turn(transforms: list[Function], batch: Any) -> Any:
    for transform in transforms:
        batch = transform(batch)
    return batch
