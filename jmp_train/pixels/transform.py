"""A random change of the images of an example or of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from jmp_train.errors import DataError, nearest
from jmp_train.fields import fits
from jmp_train.types import Batch


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """A random change of images; two are equal if they do the same."""

    change: Callable[..., np.ndarray]
    """`change(images, rng, *arguments)` of a batch of images."""
    arguments: tuple[Any, ...]
    computes_in: Literal["any", "floating", "uint8"]
    """What it computes with; images are converted to it and back."""
    colours: bool = False
    """Whether it has to know the meaning of the channels: grey, RGB or RGBA."""

    def __call__(self, batch: Batch, rng: np.random.Generator) -> Batch:
        if "image" not in batch:
            raise DataError(f"the data have no array 'image'; {nearest('image', batch)}")
        image = np.asarray(batch["image"])
        self._check(image)
        images = image if image.ndim == 4 else image[None]
        if image.dtype == np.uint8 and self.computes_in == "floating":
            images = images / np.float32(255)
        elif image.dtype != np.uint8 and self.computes_in == "uint8":
            images = np.rint(images * 255).astype(np.uint8)
        changed = self.change(images, rng, *self.arguments)
        if changed.dtype != image.dtype and image.dtype == np.uint8:
            changed = np.rint(changed * 255).astype(np.uint8)
        elif changed.dtype != image.dtype:
            changed = changed.astype(image.dtype) / image.dtype.type(255)
        return {**batch, "image": changed if image.ndim == 4 else changed[0]}

    def _check(self, image: np.ndarray) -> None:
        channels = image.shape[-1] if image.ndim in (3, 4) else 0
        if not channels or (self.colours and channels not in (1, 3, 4)):
            kinds = "1, 3 or 4 channels" if self.colours else "channels"
            raise DataError(
                f"'image' has shape {image.shape}; expected (height, width, channels), with a batch axis "
                f"before them or without, and {kinds}"
            )
        if image.dtype != np.uint8 and image.dtype.kind != "f":
            raise DataError(f"'image' has dtype {image.dtype}; expected float32, or uint8")
        if self.colours and image.dtype != np.uint8 and image.size:
            low, high = image.min(), image.max()
            if not (low >= 0 and high <= 1):
                raise DataError(
                    f"'image' has values from {low:g} to {high:g}; expected 0 to 1: normalise after "
                    "changes of colour"
                )


def check_number(name: str, value: Any, low: float, high: float, kind: type = float) -> None:
    """Raise DataError for a number of another type, or out of range."""
    if not fits(value, kind) or not low <= value <= high:
        what = "a whole number from " if kind is int else ""
        raise DataError(f"{name} is {value!r}; expected {what}{low:g} to {high:g}")


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Raise DataError for what is no ascending pair of numbers within bounds."""
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    real = pair and all(fits(x, float) for x in value)
    if not (real and low <= value[0] <= value[1] <= high and value[1] > 0):
        raise DataError(f"{name} is {value!r}; expected (least, largest) from {low:g} to {high:g}")
