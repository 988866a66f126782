"""Examples that a user names on the command line: arrays in files, or a folder of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jmp_train.errors import nearest
from jmp_train.sources.decode import IMAGES, MODES, read_image
from jmp_train.sources.npz import read_npy, read_npz
from jmp_train.spec import DataSpec


class Inputs(NamedTuple):
    """Examples to predict on."""

    arrays: dict[str, np.ndarray]
    """Arrays by name, whose leading axis counts examples."""
    files: list[str] | None
    """The name of each example's file, for a folder; else None."""
    scaled: bool = False
    """Whether uint8 was divided by 255, for a model of floating numbers."""


def read_inputs(
    path: Path,
    names: tuple[str, ...],
    spec: DataSpec,
    *,
    transformed: bool = False,
    image_reader: Callable[[Path], np.ndarray] | None = None,
) -> Inputs:
    """Read the arrays that a model predicts on.

    Numbers in uint8 are divided by 255 if the model was trained on floating ones, as in `NpzConfig`.

    Args:
      path: a .npz file with arrays of these names, or one array of any name for a model of one input;
        a .npy file of that array; or a folder whose .npy files and images are an example each.
      names: names of the model's inputs.
      spec: spec of the data that it was trained on.
      transformed: whether the arrays will be transformed: then all of them are returned, as they are
        stored, and their shapes are not checked.
      image_reader: reads an image of a folder as the training images were read; None: an image has the
        size that the spec says.

    Raises:
      ValueError: for a file that cannot be read, or does not have what the model reads.
    """
    files = None
    if path.is_dir():
        _need_one(path, names, "a folder")
        files, array = _read_folder(path, names[0], spec, image_reader, check=not transformed)
        arrays = {names[0]: array}
    elif path.suffix.lower() == ".npy":
        _need_one(path, names, "a .npy file")
        arrays = {names[0]: read_npy(path)}
    elif path.suffix.lower() == ".npz":
        arrays = read_npz(path)
        if len(arrays) == 1 and len(names) == 1:
            arrays = {names[0]: next(iter(arrays.values()))}
    else:
        raise ValueError(
            f"the input is {str(path)!r}; expected a .npz or .npy file, or a folder of .npy files or "
            "images"
        )
    if transformed:
        return Inputs(arrays, files)
    missing = [name for name in names if name not in arrays]
    if missing:
        hint = nearest(missing[0], arrays) if arrays else "it contains no arrays"
        raise ValueError(f"{path} has no array {missing[0]!r}; {hint}")
    arrays = {name: arrays[name] for name in names}
    bytes_ = [name for name in names if _is_scaled(arrays[name], spec, name)]
    scaled = {name: arrays[name].astype(np.float32) / np.float32(255) for name in bytes_}
    return Inputs({**arrays, **scaled}, files, scaled=bool(bytes_))


def _is_scaled(array: np.ndarray, spec: DataSpec, name: str) -> bool:
    return array.dtype == np.uint8 and np.dtype(spec.example[name].dtype).kind not in "iub"


def _need_one(path: Path, names: tuple[str, ...], what: str) -> None:
    if len(names) != 1:
        raise ValueError(
            f"{path} is {what}, and the model reads {' and '.join(names)}; expected a .npz file of these"
        )


def _read_folder(
    path: Path,
    name: str,
    spec: DataSpec,
    image_reader: Callable[[Path], np.ndarray] | None,
    *,
    check: bool,
) -> tuple[list[str], np.ndarray]:
    """Return the names of the files, sorted, and their examples in one array."""
    readers: Mapping[str, Callable[[Path, tuple[int, ...]], np.ndarray]]
    readers = {".npy": lambda file, shape: read_npy(file)} | dict.fromkeys(
        IMAGES, _read_image if image_reader is None else lambda file, shape: image_reader(file)
    )
    try:
        found = sorted(f for f in path.iterdir() if f.suffix.lower() in readers and f.is_file())
        found = [file for file in found if file.name[0] != "."]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not found:
        raise ValueError(
            f"{path} has no .npy files and no images; expected an example in each file"
        )
    shape = spec.example[name].shape
    rows = []
    for file in found:
        row = readers[file.suffix.lower()](file, shape)
        expected, why = (
            (shape, "in training")
            if check
            else (rows[0].shape if rows else row.shape, found[0].name)
        )
        if row.shape != expected:
            raise ValueError(f"{file} has shape {row.shape}; expected {expected}, as {why}")
        if rows and row.dtype != rows[0].dtype:
            raise ValueError(
                f"{file} has dtype {row.dtype}; expected {rows[0].dtype}, as {found[0].name}"
            )
        rows.append(row)
    return [file.name for file in found], np.stack(rows)


def _read_image(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return an image, uint8, in as many channels as the shape of an example has.

    Raises:
      ValueError: for a damaged image, without Pillow, and for a shape that no image can have.
    """
    channels = shape[2] if len(shape) == 3 else 1
    if len(shape) not in (2, 3) or channels not in MODES:
        raise ValueError(
            f"{path} is an image, and an example has shape {shape}; expected .npy files of that shape"
        )
    pixels = read_image(path, channels)
    return pixels if len(shape) == 3 else pixels[..., 0]
