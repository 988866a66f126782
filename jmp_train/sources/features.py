"""Columns of data that other libraries store: which are read, and as what arrays."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from jmp_train.errors import DataError, nearest
from jmp_train.sources.checks import check_example
from jmp_train.sources.decode import decode_image, read_image
from jmp_train.sources.files import within
from jmp_train.sources.images import as_floats, check_image_size
from jmp_train.types import Batch

_T = TypeVar("_T")


class Kind(NamedTuple):
    """What a column has."""

    of: Literal["images", "classes", "integers", "numbers", "other"]
    """Classes are integers whose number is known; integers are scalars, numbers of any fixed shape."""
    what: str
    """A word for messages, such as `string`."""
    classes: int | None = None
    """The number of classes."""


class Column(NamedTuple):
    """A column that is read."""

    column: str
    name: str
    """Of its array in an example."""
    kind: Kind


def choose(
    kinds: Mapping[str, Kind],
    *,
    image: str | None,
    label: str | None,
    columns: Sequence[str],
    where: str,
) -> list[Column]:
    """Return the columns to read.

    Args:
      kinds: what each column has.
      image: column that is named `image` in examples; None: the only one of images, if there is one.
      label: column that is named `label`; None: there is none.
      columns: columns to read beside these; none given: all.
      where: name of the data in messages.

    Raises:
      DataError: for a missing column, with the nearest one; for a column of neither numbers nor
        images; for two arrays of one name.

    >>> kinds = {"x": Kind("numbers", "float32"), "y": Kind("classes", "ClassLabel", 3)}
    >>> [(c.column, c.name) for c in choose(kinds, image=None, label="y", columns=(), where="it")]
    [('x', 'x'), ('y', 'label')]
    """
    for name in (*columns, image, label):
        if name is not None and name not in kinds:
            hint = ""
            if name == label == "label":
                hint = "; label=None (--data.label None) for data without classes"
            raise DataError(f"{where} has no column {name!r}; {nearest(name, kinds)}{hint}")
    wanted = [*(columns or kinds), *(n for n in (image, label) if n is not None)]
    wanted = list(dict.fromkeys(wanted))
    images = [name for name in wanted if kinds[name].of == "images"]
    if image is not None and image not in images:
        raise DataError(f"{where}: {image!r} is {kinds[image].what}; expected a column of images")
    if image is None and len(images) == 1:
        image = images[0]
    if label is not None and kinds[label].of not in ("classes", "integers"):
        raise DataError(f"{where}: {label!r} is {kinds[label].what}; expected integers as labels")
    for name in wanted:
        if kinds[name].of == "other":
            good = [n for n, kind in kinds.items() if kind.of != "other" and n != label]
            such = f", such as {' '.join(good)}" if good else ""
            raise DataError(
                f"{where}: {name!r} is {kinds[name].what}; expected numbers or images: choose columns "
                f"(--data.columns{such})"
            )
    chosen = [Column(n, {image: "image", label: "label"}.get(n, n), kinds[n]) for n in wanted]
    for column in chosen:
        same = [other.column for other in chosen if other.name == column.name]
        if len(same) > 1:
            raise DataError(
                f"{where}: {same[0]!r} and {same[1]!r} would both be {column.name!r}; expected one of "
                "them: choose columns (--data.columns)"
            )
    if not [column for column in chosen if column.name != "label"]:
        raise DataError(f"{where} has no columns beside {label!r}; expected inputs")
    return chosen


class ImageReader:
    """Reads images that a library stores, as `image_folder` reads files.

    Args:
      size: height and width of the images.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA).
      folders: an image that is stored as the path of a file is read if it is inside one of these.

    Raises:
      DataError: for a size or a number of channels that is not possible.
    """

    def __init__(self, size: int, channels: int, folders: Sequence[str | Path] = ()):
        check_image_size(size, channels)
        self._size, self._channels, self._folders = size, channels, tuple(folders)

    def read(self, content: bytes | None, path: str | None, name: str) -> np.ndarray:
        """Return an image, float32 (size, size, channels) from 0 to 1.

        Args:
          content: bytes of its file; None: they are in `path`.
          path: path of its file.
          name: name of the column in messages.

        Raises:
          DataError: for a damaged image, and for a file that is elsewhere.
        """
        try:
            if content is not None:
                what = repr(name) if path is None else f"{name!r} ({path})"
                return as_floats(decode_image(content, self._channels, self._size, name=what))
            if path is None:
                raise DataError(f"{name!r} has no value; expected an image in each row")
            if not any(within(path, folder) for folder in self._folders):
                raise DataError(
                    f"{name!r} is the file {path}; expected the bytes of an image, or a file of the data"
                )
            return as_floats(read_image(path, self._channels, self._size))
        except DataError:
            raise
        except ValueError as error:
            raise DataError(str(error)) from error


def read_table(table: Any, columns: Sequence[Column], reader: ImageReader) -> Batch:
    """Return the rows of a PyArrow table as a batch.

    Args:
      table: has the columns.
      columns: what to read.
      reader: reads the images.

    Raises:
      DataError: for a missing value, lists of different lengths, and an image that cannot be read.
    """
    found = {}
    for column in columns:
        chunks = table[column.column]
        if column.kind.of == "images":
            stored = chunks.to_pylist()
            found[column.name] = _stack_images(
                [_stored(row) for row in stored], reader, column.column
            )
        else:
            found[column.name] = _numbers(chunks, column.column)
    return check_example(found, "the data")


def stack_rows(rows: Sequence[Any], columns: Sequence[Column], reader: ImageReader) -> Batch:
    """Return rows, dicts of arrays by column with the bytes of images, as a batch.

    Raises:
      DataError: as `read_table`.
    """
    found = {}
    for column in columns:
        values = [row[column.column] for row in rows]
        if column.kind.of == "images":
            stored = [(value, None) for value in values]
            found[column.name] = _stack_images(stored, reader, column.column)
            continue
        arrays = [np.asarray(value) for value in values]
        for array in arrays:
            if array.shape != arrays[0].shape:
                raise _ragged(column.column, arrays[0].shape, array.shape)
        found[column.name] = np.stack(arrays)
    return check_example(found, "the data")


def _stored(value: Any) -> tuple[bytes | None, str | None]:
    return (None, None) if value is None else (value.get("bytes"), value.get("path"))


def _stack_images(stored: Sequence[Any], reader: ImageReader, name: str) -> np.ndarray:
    return np.stack([reader.read(content, path, name) for content, path in stored])


def _numbers(chunks: Any, name: str) -> np.ndarray:
    """Return a column of a PyArrow table as an array of numbers."""
    import pyarrow

    parts = [getattr(chunk, "storage", chunk) for chunk in chunks.chunks]  # of extension types
    joined = pyarrow.concat_arrays(parts) if len(parts) != 1 else parts[0]
    array = _array_of(joined, name)
    return array if array.flags.writeable else array.copy()


def _array_of(column: Any, name: str) -> np.ndarray:
    import pyarrow.types as of

    if column.null_count:
        raise DataError(f"{name!r} has no value, or a missing one in it; expected one in each row")
    kind = column.type
    if of.is_fixed_size_list(kind):
        size = kind.list_size
    elif of.is_list(kind) or of.is_large_list(kind):
        sizes = np.asarray(column.value_lengths())
        size = int(sizes[0])
        if (sizes != size).any():
            raise _ragged(name, size, int(sizes[sizes != size][0]))
    elif of.is_integer(kind) or of.is_floating(kind) or of.is_boolean(kind):
        return np.asarray(column.to_numpy(zero_copy_only=False))
    else:
        raise DataError(f"{name!r} is {kind}; expected numbers")
    inner = _array_of(column.flatten(), name)
    return inner.reshape(len(column), size, *inner.shape[1:])


def _ragged(name: str, first: Any, other: Any) -> DataError:
    return DataError(
        f"{name!r} has the sizes {first} and {other}; expected one size in all rows: choose other "
        "columns (--data.columns)"
    )


def one_of(source: Callable[[np.ndarray], Batch], index: int) -> Batch:
    """Return the example with an index from a function that returns batches."""
    return {name: array[0] for name, array in source(np.array([index])).items()}


def check_split(split: str, names: Sequence[str], where: str) -> None:
    """Raise DataError for a split, or a sum of parts such as `train[:80%]+test`, that is missing."""
    for part in split.split("+"):
        name = part.split("[")[0].strip()
        if name not in names:
            raise DataError(f"{where} has no split {name!r}; {nearest(name, names)}")


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} for other JSON.

    Raises:
      DataError: for a file that cannot be read.
    """
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    return found if isinstance(found, dict) else {}


def guarded(action: Callable[[], _T], where: str) -> _T:
    """Return what a call of a library returns.

    Args:
      action: calls the library.
      where: name of what it reads, in messages.

    Raises:
      DataError: for any error of it, in one line.
    """
    try:
        return action()
    except DataError:
        raise
    except Exception as error:  # the libraries raise many types
        what = (str(error).strip() or "no reason given").splitlines()[0]
        raise DataError(f"{where} cannot be read: {type(error).__name__}: {what}") from error
