"""NumPy's files of arrays, read without pickle, and only if their headers are honest."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from jmp_train.errors import nearest
from jmp_train.sources.files import check_file, check_memory


def open_npz(path: Path) -> zipfile.ZipFile:
    """Open a .npz file.

    Raises:
      ValueError: for a missing file, with the nearest existing one; for a file of another kind.
    """
    check_file(path, ".npz")
    try:
        return zipfile.ZipFile(path)
    except Exception as error:
        raise ValueError(f"{path} {_why_not_an_archive(path)}") from error


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a .npz file by name.

    Raises:
      ValueError: for a missing or damaged file, for arrays of Python objects, and for arrays that need
        more than the available memory.
    """
    with open_npz(path) as file:
        names = [n.removesuffix(".npy") for n in file.namelist() if n.endswith(".npy")]
        headers = read_headers(path, file, names)
        refuse_objects(path, {name: header.dtype for name, header in headers.items()})
        check_memory(path, sum(math.prod(h.shape) * h.dtype.itemsize for h in headers.values()))
        return {name: read_entry(path, file, name, h) for name, h in headers.items()}


def read_npy(path: Path) -> np.ndarray:
    """Return the array of a .npy file.

    Raises:
      ValueError: as `read_npz`.
    """
    check_file(path, ".npy")
    name = path.stem
    try:
        stream = path.open("rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    with stream:
        try:
            shape, _, dtype = npy_header(stream, path.stat().st_size)
        except Exception as error:
            raise _damaged(path, name, error) from error
        refuse_objects(path, {name: dtype})
        check_memory(path, math.prod(shape) * dtype.itemsize)
        stream.seek(0)
        try:
            return _numbers(stream)
        except Exception as error:
            raise _damaged(path, name, error) from error


def refuse_objects(path: Path, dtypes: Mapping[str, np.dtype]) -> None:
    """Raise ValueError for an array of Python objects."""
    for name, dtype in dtypes.items():
        if dtype.hasobject:
            raise ValueError(
                f"{path}: {name!r} contains Python objects, which are not read because unpickling "
                "can run code; expected numbers"
            )


class Header(NamedTuple):
    """Shape and dtype in the header of an array, and the archive entry of the array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    entry: zipfile.ZipInfo


def _why_not_an_archive(path: Path) -> str:
    """Say why a file is not a zip archive, for the end of an error message."""
    try:
        with path.open("rb") as file:
            start = file.read(6)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not start:
        return "is empty; expected a .npz file, as written by numpy.savez"
    if start == b"\x93NUMPY":
        return "is a .npy file of one array; expected a .npz file, as written by numpy.savez"
    if start.startswith(b"PK"):
        return "is truncated or damaged; expected a complete .npz file, as written by numpy.savez"
    return "is not a .npz file; expected a .npz file, as written by numpy.savez"


def _damaged(path: Path, name: str, error: object) -> ValueError:
    text = str(error).strip() or type(error).__name__
    return ValueError(
        f"{path}: {name!r} is damaged: {text.splitlines()[0]}; expected a complete file"
    )


def read_headers(path: Path, file: zipfile.ZipFile, names: Iterable[str]) -> dict[str, Header]:
    """Return the headers of some arrays of a .npz file.

    Raises:
      ValueError: for an array that it lacks, with the nearest name, and for a damaged header.
    """
    entries = {
        entry.filename.removesuffix(".npy"): entry
        for entry in file.infolist()
        if entry.filename.endswith(".npy")
    }
    found = {}
    for name in names:
        if name not in entries:
            hint = nearest(name, entries) if entries else "it contains no arrays"
            raise ValueError(f"{path} has no array {name!r}; {hint}")
        try:
            with file.open(entries[name]) as stream:
                shape, _, dtype = npy_header(stream, entries[name].file_size)
            found[name] = Header(shape, dtype, entries[name])
        # zipfile, its decompressors and NumPy's parser raise many types for damaged files.
        except Exception as error:
            raise _damaged(path, name, error) from error
    return found


def npy_header(stream: IO[bytes], end: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return the shape, whether the order is Fortran's, and the dtype of an array that ends at a place
    in a stream, which is at its header."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with warnings.catch_warnings(action="ignore"):
        version = np.lib.format.read_magic(stream)
        if version not in readers:
            raise ValueError(f"its .npy version is {version}, expected 1.0 or 2.0")
        shape, fortran, dtype = readers[version](stream)
    if min(shape, default=0) < 0:
        raise ValueError(f"its shape is {shape}")
    claimed = math.prod(shape) * dtype.itemsize
    stored = end - stream.tell()
    if not dtype.hasobject and claimed != stored:
        raise ValueError(f"its shape {shape} of {dtype} needs {claimed} bytes, and it has {stored}")
    return shape, fortran, dtype


def read_entry(path: Path, file: zipfile.ZipFile, name: str, header: Header) -> np.ndarray:
    """Return an array of a .npz file.

    Raises:
      ValueError: if it is damaged.
    """
    try:
        with file.open(header.entry) as stream:
            return _numbers(stream)
    except Exception as error:
        raise _damaged(path, name, error) from error


def _numbers(stream: IO[bytes]) -> np.ndarray:
    with warnings.catch_warnings(action="ignore"):
        # `read_array` reads to the end of a zip entry, where zipfile compares the checksum.
        return np.lib.format.read_array(stream, allow_pickle=False)
