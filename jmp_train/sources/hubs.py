"""Data sets of Hugging Face `datasets`: on disk, of local files, and of the hub.

Code that comes with a data set is never run: only formats of files are read, by the library's own
readers. TFDS data sets are in `jmp_train.sources.tfds`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from jmp_train.errors import DataError, nearest
from jmp_train.sources.features import (
    Column,
    ImageReader,
    Kind,
    check_split,
    choose,
    guarded,
    one_of,
    read_json,
    read_table,
)
from jmp_train.sources.files import check_folder, within
from jmp_train.sources.hub_streams import ShardStream
from jmp_train.sources.images import image_reader
from jmp_train.types import Batch

_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"  # of Dataset and DatasetDict
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def hugging_face(
    path: str,
    name: str | None = None,
    split: str = "train",
    held_out: str | None = None,
    image: str | None = None,
    label: str | None = "label",
    columns: tuple[str, ...] = (),
    size: int = 32,
    channels: int = 3,
    streaming: bool = False,
    buffer: int = 1000,
) -> Any:
    """Return a data set of Hugging Face `datasets`, for `jt.Data`.

    Columns of numbers, and lists of a fixed shape, become arrays of their names. The label becomes
    `label`, int32, with the number of classes of a `ClassLabel`. Images become float32 (size, size,
    channels) from 0 to 1.

    Args:
      path: folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote; a folder of files
        that `datasets.load_dataset` reads, such as Parquet, CSV or images; or the name of a data set on
        the hub, such as `ylecun/mnist`, which is downloaded.
      name: configuration of the data set; None: its only one.
      split: split to train on. Of files and the hub, a part such as `train[:80%]` too.
      held_out: split that is held out, or for a folder of one `Dataset`, another such folder; None: a
        share of `split` is held out.
      image: column that becomes `image`; None: the only column of images.
      label: column of classes, a `ClassLabel` or integers from 0; None: there is none.
      columns: columns to read beside those of the image and the label; none given: all.
      size: height and width that images are resized to, after the longer side is cut to the shorter
        one, equally at both ends.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA).
      streaming: whether to read in order, without a copy on disk. Files are shuffled each pass, and
        examples in groups of `buffer`. Needs `held_out`.
      buffer: number of examples that are shuffled together in streaming.

    Returns:
      A source with `len`, `[i]` and `take(rows)`, or a Grain `IterDataset` in streaming; with
      `held_out`, a pair of them.

    Raises:
      DataError: for a missing folder, split or column, with the nearest one; for a column of texts that
        is not left out; for a data set that the library cannot read; without the library.

    >>> import tempfile
    >>> from datasets import Dataset
    >>> folder = f"{tempfile.mkdtemp()}/points"
    >>> rows = {"x": [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], "label": [0, 1, 1]}
    >>> Dataset.from_dict(rows).save_to_disk(folder)
    >>> data = hugging_face(folder)
    >>> len(data), data[1]["x"], data.take(np.array([2, 0]))["label"], data.classes
    (3, array([2., 3.], dtype=float32), array([1, 0], dtype=int32), 2)
    """
    if buffer < 1:
        raise DataError(f"buffer is {buffer}; expected at least 1")
    if streaming and held_out is None:
        raise DataError(
            "a stream cannot be split; expected held_out (--data.held-out), the name of another split"
        )
    library = _library(path)
    wanted = {"image": image, "label": label, "columns": columns}
    sources, first = [], None
    for part in (split,) if held_out is None else (split, held_out):
        opened = _open(library, path, name, part, bool(sources), streaming)
        reader = ImageReader(size, channels, opened.folders)
        kinds = {key: _kind(feature) for key, feature in (opened.data.features or {}).items()}
        chosen = choose(kinds, where=opened.where, **wanted)
        if first is not None and first != chosen:
            raise DataError(
                f"{opened.where} has other columns, or other classes, than {path} ({split}); expected "
                "the same"
            )
        first = chosen
        data = _undecoded(library, opened.data, chosen)
        if streaming:
            together = None if sources else buffer  # the second is held out
            sources.append(ShardStream(data, chosen, reader, together))
        else:
            sources.append(HubRows(data, chosen, reader))
    return sources[0] if held_out is None else tuple(sources)


cast(Any, hugging_face).image_reader = image_reader  # how predict reads an image


class HubRows:
    """A source of the rows of a `datasets.Dataset`.

    Args:
      data: the data set, in the format of PyArrow tables and with undecoded images.
      columns: what to read.
      reader: reads the images.
    """

    takes_rows = True

    def __init__(self, data: Any, columns: list[Column], reader: ImageReader):
        self._data, self._columns, self._reader = data, columns, reader
        self.classes = _class_count(data, columns)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Batch:
        return one_of(self.take, index)

    def take(self, rows: np.ndarray) -> Batch:
        """Return the rows with these indices as a batch.

        Raises:
          DataError: for a missing value, lists of different lengths, and an image that cannot be read.
        """
        table = guarded(lambda: self._data[[int(row) for row in rows]], "rows of the data")
        return read_table(table, self._columns, self._reader)


class _Opened(NamedTuple):
    """A split that was opened."""

    data: Any
    """A `Dataset` or an `IterableDataset`."""
    where: str
    """Its name in messages."""
    folders: tuple[str, ...]
    """Where files of images may be."""


def _library(path: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{path} is data of Hugging Face; expected datasets: pip install 'jmp-train[hugging-face]'"
        ) from None
    return datasets


def _open(
    library: Any, path: str, name: str | None, split: str, held_out: bool, streaming: bool
) -> _Opened:
    """Open a split of a data set."""
    folder = Path(path)
    where = f"{path} ({split})"
    if (folder / _SAVED_SPLITS).is_file():
        splits = read_json(folder / _SAVED_SPLITS).get("splits")
        names = [s for s in splits if isinstance(s, str)] if isinstance(splits, list) else []
        if split not in names:
            raise DataError(f"{path} has no split {split!r}; {nearest(split, names)}")
        return _Opened(_saved(library, folder / split, folder, streaming), where, (path,))
    if (folder / _SAVED).is_file():
        if held_out:
            folder, where = Path(split), split
            check_folder(folder)
        data = _saved(library, folder, folder, streaming)
        if not held_out and split not in ("train", str(data.split)):
            raise DataError(f"{path} has no split {split!r}; it is a Dataset: expected split=train")
        return _Opened(data, where, (str(folder),))
    if folder.exists() or not _HUB_NAME.fullmatch(path):
        check_folder(folder)
        place = str(folder.absolute())  # the library has readers with names, such as pandas
        with _quiet(library):
            builder = guarded(lambda: library.load_dataset_builder(place, name), where)
            _check_files(builder, folder)
            return _Opened(_built(builder, split, where, streaming), where, (place,))
    hub = f"{path} is no folder here; as a name on the hub, it"
    builder = guarded(lambda: library.load_dataset_builder(path, name), hub)
    cache = str(library.config.HF_CACHE_HOME)
    return _Opened(_built(builder, split, where, streaming), where, (cache,))


def _saved(library: Any, folder: Path, root: Path, streaming: bool) -> Any:
    """Return the data set in a folder that `Dataset.save_to_disk` wrote."""
    if not within(folder, root):
        raise DataError(f"{folder} is outside of {root}; expected a folder in it")
    check_folder(folder)
    files = read_json(folder / _SAVED).get("_data_files")
    files = files if isinstance(files, list) else []
    for file in files:
        given = file.get("filename") if isinstance(file, dict) else None
        if not isinstance(given, str) or not within(folder / given, folder):
            raise DataError(f"{folder / _SAVED} names the file {given!r}; expected one in {folder}")
    data = guarded(lambda: library.load_from_disk(str(folder)), str(folder)).with_format(None)
    if not streaming:
        return data
    if not len(data):
        raise DataError(f"{folder} has no rows; expected at least one")
    return data.to_iterable_dataset(num_shards=max(1, min(len(files), len(data))))


def _built(builder: Any, split: str, where: str, streaming: bool) -> Any:
    """Return a split of a data set of files."""
    if streaming:
        return guarded(lambda: builder.as_streaming_dataset(split), where)
    guarded(builder.download_and_prepare, where)
    check_split(split, list(builder.info.splits or {}), where.rsplit(" (", 1)[0])
    return guarded(lambda: builder.as_dataset(split), where)


def _check_files(builder: Any, folder: Path) -> None:
    """Raise DataError for a folder whose README names files that are elsewhere."""
    for files in (builder.config.data_files or {}).values():
        for file in map(str, files):
            if "://" in file or not within(file, folder):
                raise DataError(f"{folder} names the file {file}; expected files in the folder")


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Show no progress of the library."""
    shown = not library.utils.are_progress_bars_disabled()
    library.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bars()


def _undecoded(library: Any, data: Any, columns: list[Column]) -> Any:
    """Return a data set of some columns as PyArrow tables, whose images are not decoded."""
    data = data.select_columns([column.column for column in columns])
    for column in columns:
        if column.kind.of == "images":
            data = data.cast_column(column.column, library.Image(decode=False))
    return data.with_format("arrow")


def _kind(feature: Any) -> Kind:
    """Return what a column of a feature of `datasets` has."""
    called = type(feature).__name__
    if called == "ClassLabel":
        return Kind("classes", called, feature.num_classes)
    if called == "Image":
        return Kind("images", called)
    if called == "Value":
        dtype = str(feature.dtype)
        if re.fullmatch(r"u?int\d+", dtype):
            return Kind("integers", dtype)
        return Kind("numbers" if re.fullmatch(r"bool|float\d+", dtype) else "other", dtype)
    if re.fullmatch(r"Array\dD", called):
        return Kind("numbers", called)
    inner = getattr(feature, "feature", None)
    if called in ("List", "LargeList", "Sequence") and inner is not None:
        of = _kind(inner)
        numbers = of.of in ("classes", "integers", "numbers")
        return Kind("numbers" if numbers else "other", f"a list of {of.what}")
    return Kind("other", "a group of columns" if isinstance(feature, dict) else called)


def _class_count(data: Any, columns: list[Column]) -> int | None:
    """Return the number of classes: of a `ClassLabel`, or of labels that are every integer from 0."""
    for column in columns:
        if column.name != "label":
            continue
        if column.kind.classes is not None:
            return column.kind.classes
        found = np.unique(data.select_columns([column.column])[:][column.column].to_numpy())
        if len(found) > 1 and found[0] == 0 and found[-1] == len(found) - 1:
            return len(found)
    return None
