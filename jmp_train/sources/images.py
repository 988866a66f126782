"""Images in files: one of them, and folders with a folder of images for each class."""

from __future__ import annotations

import functools
import io
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np

from jmp_train.errors import DataError, nearest
from jmp_train.sources.files import check_folder, named, within
from jmp_train.types import Batch

#: Endings of the images that are read, each by Pillow.
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_16_BITS = re.compile(r"\b(RGB|RGBA|RGBX|RGBa|LA|CMYK);16[BLN]")  # Pillow's raw modes
_LARGEST_IMAGE = 2**28  # pixels; a small file may claim to be huge


def read_image(path: Path | str, channels: int, size: int | None = None) -> np.ndarray:
    """Return an image, uint8 (height, width, channels).

    Args:
      path: of a file that Pillow reads, of 8 bits a channel.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA).
      size: height and width to resize to, after the longer side is cut to the shorter one, equally at
        both ends. None keeps the image as it is.

    Raises:
      ValueError: for a damaged image, one of more than 8 bits a channel, and without Pillow.
    """
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


def _read(source: Any, name: str, channels: int, size: int | None) -> np.ndarray:
    """Return the image in a file, which is a path or open; `name` is for messages."""
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(f"{name} is an image; expected Pillow: pip install pillow") from None
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


class ImageFolder:
    """A source of labelled images: a folder with a folder of images for each class.

    An example is a dict of `image`, float32 (size, size, channels) from 0 to 1, and `label`, int32: the
    place of the folder's name among the class names.

    Args:
      path: the folder.
      size: height and width of the images.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA).
      follow_links: whether files may be reached by symbolic links that lead out of the folder.
      class_names: names of the folders, in the order of the labels; None: all folders, sorted.

    Raises:
      DataError: for a folder without classes, a class without images, a folder whose name is not among
        the class names, and a link that leads out of the folder.
    """

    takes_rows = True

    def __init__(
        self,
        path: str | Path,
        size: int = 32,
        channels: int = 3,
        *,
        follow_links: bool = False,
        class_names: tuple[str, ...] | None = None,
    ):
        root = Path(path)
        check_folder(root)
        found = tuple(sorted(e.name for e in _entries(root) if _is_class(e)))
        if not found:
            raise DataError(
                f"{root} has no folders; expected one for each class, with its images, such as "
                f"{root / 'cat' / '1.png'}"
            )
        if class_names is None:
            class_names = found
        for name in found:
            if name not in class_names:
                raise DataError(
                    f"{root / name} is no class of the training images; "
                    f"{nearest(name, class_names)}"
                )
        self.class_names = class_names
        self._size, self._channels = size, channels
        self._files: list[str] = []
        labels: list[int] = []
        for name in found:
            if not follow_links:
                _check_inside(str(root / name), root)
            files = _images(root, root / name, follow_links)
            self._files += files
            labels += [class_names.index(name)] * len(files)
        self._labels = np.asarray(labels, np.int32)

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    def describe(self, index: int) -> str:
        """Return the file of an example."""
        return self._files[index]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Batch:
        return {name: array[0] for name, array in self.take(np.array([index])).items()}

    def take(self, rows: np.ndarray) -> Batch:
        """Return the images with these indices as a batch, decoded in as many threads as there are CPUs.

        Raises:
          DataError: for one that cannot be read.
        """
        images = np.empty((len(rows), self._size, self._size, self._channels), np.float32)

        def read(place: int) -> None:
            pixels = read_image(self._files[rows[place]], self._channels, self._size)
            np.divide(pixels, np.float32(255), out=images[place])

        try:
            if len(rows) == 1:
                read(0)
            else:
                list(_threads().map(read, range(len(rows))))
        except ValueError as error:
            raise DataError(str(error)) from error
        return {"image": images, "label": self._labels[rows]}


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Return threads that decode images; Pillow decodes outside of Python's lock."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, 16), "decode")


def image_folder(
    path: str,
    held_out: str | None = None,
    size: int = 32,
    channels: int = 3,
    follow_links: bool = False,
) -> Any:
    """Return the labelled images of a folder, for `jt.Data`.

    Args:
      path: folder with a folder of images for each class.
      held_out: a folder of the same form with the held-out images; None: a fraction of `path` is held
        out.
      size: height and width that images are resized to, after the longer side is cut to the shorter
        one, equally at both ends.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA).
      follow_links: whether images may be reached by symbolic links that lead out of the folder.

    Raises:
      DataError: as `ImageFolder`, and for a size or a number of channels that is not possible.

    >>> import tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("cat", "dog"):
    ...     (folder / name).mkdir()
    ...     Image.new("RGB", (40, 30)).save(folder / name / "1.png")
    >>> images = image_folder(str(folder), size=16)
    >>> len(images), images.class_names, images[1]["image"].shape, images[1]["label"]
    (2, ('cat', 'dog'), (16, 16, 3), np.int32(1))
    """
    check_image_size(size, channels)
    train = ImageFolder(named(path), size, channels, follow_links=follow_links)
    if held_out is None:
        return train
    names = train.class_names
    return train, ImageFolder(
        named(held_out), size, channels, follow_links=follow_links, class_names=names
    )


def check_image_size(size: int, channels: int) -> None:
    """Raise DataError for a height and width, or a number of channels, that is not possible."""
    if not 1 <= size <= 2**14:
        raise DataError(f"size is {size}; expected 1 to {2**14}")
    if channels not in MODES:
        raise DataError(f"channels is {channels}; expected 1, 3 or 4")


def as_floats(pixels: np.ndarray) -> np.ndarray:
    """Return pixels, uint8, as float32 from 0 to 1."""
    return pixels.astype(np.float32) / np.float32(255)


def _read_floats(path: Path | str, channels: int, size: int) -> np.ndarray:
    """Return an image, float32 (size, size, channels) from 0 to 1."""
    return as_floats(read_image(path, channels, size))


def image_reader(settings: dict[str, Any]) -> Callable[[Path], np.ndarray]:
    """Return the function that reads one image as data with these settings do."""
    return functools.partial(_read_floats, channels=settings["channels"], size=settings["size"])


cast(Any, image_folder).image_reader = image_reader  # how predict reads an image


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from None


def _is_class(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and entry.is_dir()


def _images(root: Path, folder: Path, follow_links: bool) -> list[str]:
    """Return the images below a folder, sorted.

    Raises:
      DataError: for none, and for one outside the root.
    """
    found, visited = [], set()
    for place, folders, files in os.walk(folder, onerror=_unreadable, followlinks=follow_links):
        real = os.path.realpath(place)
        if real in visited:  # links in a circle
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        images = [n for n in sorted(files) if n[0] != "." and _is_image(n)]
        images = [n for n in images if not _is_special(os.path.join(place, n))]
        linked = [n for n in (*folders, *images) if os.path.islink(os.path.join(place, n))]
        for name in () if follow_links else linked:
            _check_inside(os.path.join(place, name), root)
        found += [os.path.join(place, name) for name in images]
    if not found:
        raise DataError(f"{folder} has no images; expected files such as {folder / '1.png'}")
    return found


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGES


def _is_special(path: str) -> bool:
    """Return whether a path is a pipe, a socket or a device, which a read would wait for."""
    return os.path.exists(path) and not os.path.isfile(path)


def _check_inside(path: str, root: Path) -> None:
    if not within(path, root):
        raise DataError(
            f"{path} is a link that leads out of {root}; expected a file in it, or follow_links=True "
            "(--data.follow-links)"
        )
