"""Folders of images: a folder for each class."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np

from jmp_train.errors import DataError, nearest
from jmp_train.sources.decode import IMAGES, MODES, Resize, check_resize, read_image
from jmp_train.sources.files import check_folder, named, within
from jmp_train.types import Batch


class ImageFolder:
    """A source of labelled images: a folder with a folder of images for each class.

    An example is a dict of `image`, float32 (size, size, channels) from 0 to 1, and `label`, int32: the
    place of the folder's name among the class names.

    Args:
      path: the folder.
      size: height and width of the images.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA).
      resize: how they are resized; see `read_image`.
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
        resize: Resize = "antialias",
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
        self._resize: Resize = resize
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
            pixels = read_image(self._files[rows[place]], self._channels, self._size, self._resize)
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
    resize: Resize = "antialias",
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
      resize: antialias: each pixel is a mean over all the pixels that it replaces; linear: of its four
        neighbours alone, which is faster (needs `pip install 'jmp-train[fast-images]'`).

    Raises:
      DataError: as `ImageFolder`, for a single class, for a size or a number of channels that is not possible, and for
        libraries that are not installed.

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
    check_resize(resize)
    make = functools.partial(
        ImageFolder, size=size, channels=channels, resize=resize, follow_links=follow_links
    )
    train = make(named(path))
    if train.classes < 2:
        raise DataError(
            f"{path} has 1 folder of images, {', '.join(map(repr, train.class_names))}; expected at least "
            "2, one for each class, or ImageFolder for data without classes"
        )
    if held_out is None:
        return train
    return train, make(named(held_out), class_names=train.class_names)


def check_image_size(size: int, channels: int) -> None:
    """Raise DataError for a height and width, or a number of channels, that is not possible."""
    if not 1 <= size <= 2**14:
        raise DataError(f"size is {size}; expected 1 to {2**14}")
    if channels not in MODES:
        raise DataError(f"channels is {channels}; expected 1, 3 or 4")


def as_floats(pixels: np.ndarray) -> np.ndarray:
    """Return pixels, of values from 0 to 255, as float32 from 0 to 1."""
    return pixels.astype(np.float32) / np.float32(255)


def _read_floats(path: Path | str, channels: int, size: int, resize: Resize) -> np.ndarray:
    """Return an image, float32 (size, size, channels) from 0 to 1."""
    return as_floats(read_image(path, channels, size, resize))


def image_reader(settings: dict[str, Any]) -> Callable[[Path], np.ndarray]:
    """Return the function that reads one image as data with these settings do."""
    resize = settings.get("resize", "antialias")
    return functools.partial(
        _read_floats, channels=settings["channels"], size=settings["size"], resize=resize
    )


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
