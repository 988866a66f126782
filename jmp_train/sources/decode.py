"""One image: the bytes of a file as pixels, resized."""

from __future__ import annotations

import io
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jmp_train.errors import DataError

#: How an image is resized.
Resize = Literal["antialias", "linear"]

#: Endings of the images that are read, each by Pillow.
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_16_BITS = re.compile(r"\b(RGB|RGBA|RGBX|RGBa|LA|CMYK);16[BLN]")  # Pillow's raw modes
_LARGEST_IMAGE = 2**28  # pixels; a small file may claim to be huge


def read_image(
    path: Path | str, channels: int, size: int | None = None, resize: Resize = "antialias"
) -> np.ndarray:
    """Return an image, (height, width, channels), of values from 0 to 255.

    Args:
      path: of a file that Pillow reads, of 8 bits a channel.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA).
      size: height and width to resize to, after the longer side is cut to the shorter one, equally at
        both ends. None keeps the image as it is.
      resize: "antialias": by Pillow's bilinear filter, a pixel is a mean over all those that it
        replaces. "linear": by OpenCV, a pixel is interpolated between its four neighbours, which takes
        about half the time; where a side is halved or more, a mean over areas.

    Returns:
      uint8, or float32 if it is resized with "linear", whose values are not rounded.

    Raises:
      ValueError: for a damaged image, and one of more than 8 bits a channel.
    """
    if size is not None and resize == "linear":
        return _read_linear(os.fspath(path), channels, size)
    return _read(path, str(path), channels, size)


def decode_image(
    content: bytes, channels: int, size: int | None = None, *, name: str = "the image"
) -> np.ndarray:
    """Return an image from the bytes of its file, as `read_image` does.

    Args:
      content: bytes of a file that Pillow reads.
      channels: as for `read_image`.
      size: as for `read_image`.
      name: name of the image in messages.

    Raises:
      ValueError: as `read_image`.

    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.new("RGB", (6, 4), (1, 2, 3)).save(file, "PNG")
    >>> decode_image(file.getvalue(), channels=3, size=2)[0, 0]
    array([1, 2, 3], dtype=uint8)
    """
    return _read(io.BytesIO(content), name, channels, size)


def check_resize(resize: str) -> None:
    """Raise DataError for a way to resize whose libraries are not installed."""
    if resize != "linear":
        return
    try:
        import cv2  # noqa: F401
        import simplejpeg  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"resize is 'linear', which needs {error.name}; expected resize 'antialias', or "
            "pip install 'jmp-train[fast-images]'"
        ) from None


def _read_linear(path: str, channels: int, size: int) -> np.ndarray:
    """Return the image in a file, float32, interpolated."""
    import cv2

    pixels = _decode_jpeg(path, channels, size) if _is_jpeg(path) else None
    if pixels is None:
        pixels = _read(path, path, channels, None)
    height, width = pixels.shape[:2]
    left, top, right, bottom = _middle(width, height)
    square = pixels[top:bottom, left:right].astype(np.float32)
    how = cv2.INTER_AREA if right - left >= 2 * size else cv2.INTER_LINEAR
    return cv2.resize(square, (size, size), interpolation=how).reshape(size, size, channels)


def _is_jpeg(path: str) -> bool:
    return path.lower().endswith((".jpg", ".jpeg"))


def _decode_jpeg(path: str, channels: int, size: int) -> np.ndarray | None:
    """Return the pixels of a JPEG; None for what Pillow has to read, or to refuse.

    It is decoded at a half of its size or less where that is not below `size`.
    """
    import simplejpeg

    if channels == 4:
        return None
    kind = {1: "GRAY", 3: "RGB"}[channels]
    try:
        with open(path, "rb") as file:
            content = file.read()
        height, width, space, _ = simplejpeg.decode_jpeg_header(content)
        if int(height) * int(width) > _LARGEST_IMAGE or space in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(content, kind, min_height=size, min_width=size, min_factor=2)
    except (OSError, ValueError):
        return None


def _read(source: Any, name: str, channels: int, size: int | None) -> np.ndarray:
    """Return the image in a file, which is a path or open; `name` is for messages."""
    from PIL import Image

    try:
        with Image.open(source) as image:
            array = _pixels(image, channels, size)
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name} cannot be read: {what}; expected a complete image of 8 bits"
        ) from error
    return array[..., None] if channels == 1 else array


def _pixels(image: Any, channels: int, size: int | None) -> np.ndarray:
    """Return the pixels of an image that Pillow opened."""
    from PIL import Image

    if math.prod(image.size) > _LARGEST_IMAGE:
        raise ValueError(f"it has {image.size[0]} by {image.size[1]} pixels")
    if image.mode.startswith(("I", "F")):  # Pillow would clip them to 8 bits
        raise ValueError(f"its mode is {image.mode}, of more than 8 bits a channel")
    if _16_BITS.search(str(getattr(image, "tile", ""))):  # and cut them here
        raise ValueError(f"its mode is {image.mode}, of 16 bits a channel")
    if size is not None:
        image.draft(MODES[channels], (size, size))  # a JPEG is decoded at a reduced size
    pixels = image.convert(MODES[channels])
    if size is not None:
        if pixels.width != pixels.height:
            pixels = pixels.crop(_middle(*pixels.size))
        pixels = pixels.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(pixels)


def _middle(width: int, height: int) -> tuple[int, int, int, int]:
    """Return the left, upper, right and lower bound of the largest square in the middle."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
