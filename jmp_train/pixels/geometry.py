"""Windows of images: shifted, cut and resampled, or mirrored; each image of a batch by its own."""

from __future__ import annotations

import numpy as np

_TRIES = 10  # as in torchvision; then the window is the largest one in the middle


def shifted(images: np.ndarray, rng: np.random.Generator, padding: int, mode: str) -> np.ndarray:
    """Return images padded at each edge, and cut to their size again at a random place.

    Args:
      images: (batch, height, width, channels).
      rng: gives each image its place.
      padding: pixels at each edge.
      mode: of `numpy.pad`; "constant" pads with 0.
    """
    count, height, width, _ = images.shape
    edges = (padding, padding)
    padded = np.pad(images, ((0, 0), edges, edges, (0, 0)), mode=mode)  # pyright: ignore
    top, left = rng.integers(0, 2 * padding + 1, (2, count, 1))
    rows, columns = top + np.arange(height), left + np.arange(width)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def mirrored(images: np.ndarray, rng: np.random.Generator, p: float) -> np.ndarray:
    """Return images, (batch, height, width, channels), of which each is mirrored with probability p."""
    chosen = rng.random(len(images)) < p
    return np.where(chosen[:, None, None, None], images[:, :, ::-1], images)


def resized_crops(
    images: np.ndarray,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Return a random window of each image, as `windows` draws it, resampled to the image's size."""
    _, height, width, _ = images.shape
    return resized_windows(images, windows(len(images), (height, width), rng, scale, ratio))


def windows(
    count: int,
    size: tuple[int, int],
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Return random windows of images, int (count, 4): top, left, height, width.

    The area is uniform within `scale`, as a share of the image, and the logarithm of width / height
    uniform within `ratio`. Of ten such windows, the first is taken that fits; if none does, the largest
    one in the middle whose width / height is within `ratio`.

    Source: `RandomResizedCrop` of torchvision; Szegedy et al. 2014, arXiv:1409.4842.
    """
    height, width = size
    area = height * width * rng.uniform(*scale, (count, _TRIES))
    low, high = np.log(ratio)
    shape = np.exp(rng.uniform(low, high, (count, _TRIES)))
    w, h = np.rint(np.sqrt(area * shape)), np.rint(np.sqrt(area / shape))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = np.arange(count), fits.argmax(1)
    found = fits.any(1)
    nearest = np.clip(width / height, *ratio)
    middle_h, middle_w = min(height, width / nearest), min(width, height * nearest)
    h = np.where(found, h[first], max(1, round(middle_h))).astype(int)
    w = np.where(found, w[first], max(1, round(middle_w))).astype(int)
    place = rng.random((2, count))
    top = np.where(found, place[0] * (height - h + 1), (height - h) // 2).astype(int)
    left = np.where(found, place[1] * (width - w + 1), (width - w) // 2).astype(int)
    return np.stack([top, left, h, w], 1)


def resized_windows(images: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return a window of each image, resampled bilinearly to the size of the image.

    A window is at most as large as its image, so it is never reduced, and no pixel is left out.

    Args:
      images: floating, (batch, height, width, channels).
      boxes: (batch, 4), as `windows` returns them.

    >>> image = np.arange(4.0, dtype=np.float32).reshape(1, 1, 4, 1)
    >>> resized_windows(image, np.array([[0, 1, 1, 2]])).ravel().tolist()
    [1.0, 1.25, 1.75, 2.0]
    """
    _, height, width, _ = images.shape
    each = np.arange(len(images))[:, None]
    near, far, part = _places(boxes[:, 0], boxes[:, 2], height, images.dtype)
    part = part[:, :, None, None]
    rows = images[each, near] * (1 - part) + images[each, far] * part
    rows = rows.transpose(0, 2, 1, 3)
    near, far, part = _places(boxes[:, 1], boxes[:, 3], width, images.dtype)
    part = part[:, :, None, None]
    return (rows[each, near] * (1 - part) + rows[each, far] * part).transpose(0, 2, 1, 3)


def _places(
    start: np.ndarray, length: np.ndarray, size: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each new pixel the two old ones beside its middle, and the share of the second."""
    place = (np.arange(size) + 0.5) * length[:, None] / size - 0.5
    place = place.clip(0, length[:, None] - 1)
    near = place.astype(int)
    far = np.minimum(near + 1, length[:, None] - 1)
    return near + start[:, None], far + start[:, None], (place - near).astype(dtype)
