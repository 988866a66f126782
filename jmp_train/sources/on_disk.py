"""Arrays in .npy and .npz files that are read a batch at a time, however large they are."""

from __future__ import annotations

import math
import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from jmp_train.errors import DataError, nearest
from jmp_train.sources.files import check_folder, named, within
from jmp_train.sources.npz import npy_header, open_npz, read_headers
from jmp_train.types import Batch

_SCALED = ("image",)
_LOCAL_HEADER = (
    30  # bytes before the name of a zip entry; its length and that of what follows end them
)


class Stored(NamedTuple):
    """An array in a file."""

    file: Path
    offset: int
    """Of its first number, in bytes."""
    shape: tuple[int, ...]
    dtype: np.dtype
    scaled: bool = False
    """Whether its numbers are divided by 255."""

    @property
    def row_bytes(self) -> int:
        """The size of an example."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class ArraysOnDisk:
    """A source of the examples in arrays that stay in their files.

    A batch is read by one system call for each example and array, so nothing but the batch is in the
    memory of the process, and a file that vanishes or is cut is an error. (A memory map would end the
    process with SIGBUS there.)

    Args:
      arrays: by name; their leading axes are equal.

    Raises:
      DataError: for arrays of different numbers of examples.
    """

    takes_rows = True

    def __init__(self, arrays: dict[str, Stored]):
        for name, array in arrays.items():
            if not array.shape:
                raise DataError(
                    f"{array.file}: {name!r} has no axes; expected a leading axis of examples"
                )
        sizes = {name: array.shape[0] for name, array in arrays.items()}
        if len(set(sizes.values())) > 1:
            shown = ", ".join(f"{name!r} has {size}" for name, size in sizes.items())
            folder = next(iter(arrays.values())).file.parent
            raise DataError(f"{folder}: {shown} examples; expected the same number in every array")
        self._arrays = arrays
        self.__setstate__({})

    def __len__(self) -> int:
        return next(iter(self._arrays.values())).shape[0]

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"the index is {index}; expected 0 to {len(self) - 1}")
        return {name: array[0] for name, array in self.take(np.array([index])).items()}

    def take(self, rows: np.ndarray) -> Batch:
        """Return the examples with these indices as a batch.

        Raises:
          DataError: for a file that cannot be read, or is shorter than it was.
        """
        return {name: self._rows(array, rows.tolist()) for name, array in self._arrays.items()}

    def describe(self, index: int) -> str:
        """Return where an example is: the file of its label, or else of its first array."""
        first = next(iter(self._arrays.values()))
        return f"{self._arrays.get('label', first).file}[{index}]"

    @property
    def classes(self) -> int | None:
        """The number of classes, if `label` has every integer from 0."""
        label = self._arrays.get("label")
        if label is None or label.dtype.kind not in "iu":
            return None
        found = np.unique(self._rows(label._replace(shape=(1, *label.shape)), [0]))
        whole = len(found) > 1 and found[0] == 0 and found[-1] == len(found) - 1
        return len(found) if whole else None

    def _rows(self, array: Stored, rows: list[int]) -> np.ndarray:
        found = np.empty((len(rows), *array.shape[1:]), array.dtype)
        if found.size:
            buffer, size = found.reshape(-1).view(np.uint8).data, array.row_bytes
            try:
                descriptor = self._descriptor(array.file)
                for place, row in enumerate(rows):
                    part = buffer[place * size : (place + 1) * size]
                    if not self._read(descriptor, part, array.offset + row * size):
                        raise DataError(f"{array.file} has become shorter; expected it unchanged")
            except OSError as error:
                raise DataError(f"{array.file} cannot be read: {error.strerror}") from None
        if array.scaled:
            return found.astype(np.float32) / np.float32(255)
        return found.astype(array.dtype.newbyteorder("="), copy=False)

    def _read(self, descriptor: int, buffer: memoryview, start: int) -> bool:
        """Fill a buffer with what follows a place in a file; return whether there was enough."""
        while buffer:
            if hasattr(os, "preadv"):
                size = os.preadv(descriptor, [buffer], start)
            else:  # Windows: one place for all threads
                with self._lock:
                    os.lseek(descriptor, start, os.SEEK_SET)
                    read = os.read(descriptor, len(buffer))
                size = len(read)
                buffer[:size] = read
            if not size:
                return False
            buffer, start = buffer[size:], start + size  # a signal or a large row cuts a read
        return True

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._opened:
                self._opened[file] = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            return self._opened[file]

    def __getstate__(self) -> dict[str, Any]:
        return {"_arrays": self._arrays}  # for a worker process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opened: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        for descriptor in self.__dict__.get("_opened", {}).values():
            close(descriptor)


def arrays_on_disk(
    path: str, held_out: str | None = None, scaled: tuple[str, ...] = _SCALED
) -> Any:
    """Return the examples in arrays that stay on disk, for `jt.Data`.

    Args:
      path: folder of .npy files, of which NAME.npy is the array NAME; or a .npz file that numpy.savez
        wrote. The leading axis of each array counts examples.
      held_out: the same, with the held-out examples; None: a fraction of `path` is held out.
      scaled: names of the arrays that are divided by 255 if they are uint8, and are float32 then.

    Raises:
      DataError: for a missing or damaged file; a compressed one; arrays of Python objects, in Fortran
        order or of different numbers of examples; a link that leads out of the folder.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> np.save(folder / "image.npy", np.full((6, 2, 2), 51, np.uint8))
    >>> np.save(folder / "label.npy", np.arange(6) % 2)
    >>> arrays = arrays_on_disk(str(folder))
    >>> len(arrays), arrays.classes, arrays[3]["image"].ravel(), arrays[3]["label"]
    (6, 2, array([0.2, 0.2, 0.2, 0.2], dtype=float32), np.int64(1))
    """
    train = _arrays(named(path), scaled)
    return train if held_out is None else (train, _arrays(named(held_out), scaled))


def _arrays(path: Path, scaled: tuple[str, ...]) -> ArraysOnDisk:
    try:
        found = _of_archive(path) if path.suffix.lower() == ".npz" else _of_folder(path)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(str(error)) from None
    for name in scaled:
        if name not in found and scaled != _SCALED:
            raise DataError(f"{path} has no array {name!r} to scale; {nearest(name, found)}")
    bytes_ = [name for name in scaled if name in found and found[name].dtype == np.uint8]
    return ArraysOnDisk({**found, **{n: found[n]._replace(scaled=True) for n in bytes_}})


def _of_folder(path: Path) -> dict[str, Stored]:
    """Return the arrays in the .npy files of a folder."""
    check_folder(path)
    files = sorted(f for f in path.iterdir() if f.suffix == ".npy" and f.name[0] != ".")
    files = [file for file in files if file.is_file()]
    if not files:
        raise DataError(f"{path} has no .npy files; expected an array in each, such as label.npy")
    found = {}
    for file in files:
        if not within(file, path):
            raise DataError(f"{file} is a link that leads out of {path}; expected a file in it")
        with file.open("rb") as stream:
            found[file.stem] = _stored(file, file.stem, stream, file.stat().st_size)
    return found


def _of_archive(path: Path) -> dict[str, Stored]:
    """Return the arrays in a .npz file whose entries are as large as what they store."""
    with open_npz(path) as archive, path.open("rb") as stream:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
        if not entries:
            raise DataError(f"{path} has no arrays; expected a file that numpy.savez wrote")
        found = {}
        for entry in entries:
            name = entry.filename.removesuffix(".npy")
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise DataError(
                    f"{path}: {name!r} is compressed or encrypted; expected numpy.savez, or NpzConfig "
                    "to read it into the memory"
                )
            read_headers(path, archive, [name])  # compares what the archive says in two places
            stream.seek(entry.header_offset)
            header = stream.read(_LOCAL_HEADER)
            stream.seek(int.from_bytes(header[26:28], "little"), os.SEEK_CUR)
            stream.seek(int.from_bytes(header[28:30], "little"), os.SEEK_CUR)
            end = stream.tell() + entry.file_size
            if end > path.stat().st_size:
                raise DataError(f"{path}: {name!r} is cut; expected a complete file")
            found[name] = _stored(path, name, stream, end)
        return found


def _stored(file: Path, name: str, stream: IO[bytes], end: int) -> Stored:
    """Return the array whose header a stream is at, and whose last number ends at a place."""
    try:
        shape, fortran, dtype = npy_header(stream, end)
    except Exception as error:  # NumPy's parser raises many types for damaged files
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{file}: {name!r} is damaged: {what}; expected a complete file") from error
    if dtype.kind not in "biufc":
        why = "Python objects" if dtype.hasobject else f"dtype {dtype}"
        raise DataError(f"{file}: {name!r} has {why}; expected numbers")
    if fortran and len(shape) > 1:
        raise DataError(
            f"{file}: {name!r} is in Fortran order; expected numpy.ascontiguousarray of it to be saved"
        )
    return Stored(file, stream.tell(), shape, dtype)
