"""Data sets that TensorFlow Datasets (TFDS) has prepared as ArrayRecord files; TensorFlow is not used."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

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
    stack_rows,
)
from jmp_train.sources.files import within
from jmp_train.sources.images import image_reader
from jmp_train.types import Batch

_NAME = re.compile(r"(\w+)(?:/([\w.@+-]+))?(?::(\d+\.\d+\.\d+))?", re.ASCII)
_VERSION = re.compile(r"\d+\.\d+\.\d+", re.ASCII)
_INFO, _FEATURES = "dataset_info.json", "features.json"
_OWN_FEATURES = "tensorflow_datasets.core.features."


def tfds_data(
    name: str,
    split: str = "train",
    held_out: str | None = None,
    data_dir: str | None = None,
    image: str | None = None,
    label: str | None = "label",
    columns: tuple[str, ...] = (),
    size: int = 32,
    channels: int = 3,
) -> Any:
    """Return a data set of TFDS, prepared as ArrayRecord files, for `jt.Data`.

    Nothing is downloaded, and neither TensorFlow nor the code that prepared the data set is needed.
    Features of numbers become arrays of their names. The label becomes `label`, int32, with the number
    of classes of a `ClassLabel`. Images become float32 (size, size, channels) from 0 to 1.

    Args:
      name: of the data set, such as `mnist`, `mnist:3.0.1` or `NAME/CONFIG`; without a version, the
        latest that is prepared.
      split: split to train on, or a part of it, such as `train[:80%]`.
      held_out: the same, held out; None: a share of `split` is held out.
      data_dir: folder of the prepared data sets; None: TFDS_DATA_DIR or ~/tensorflow_datasets.
      image: feature that becomes `image`; None: the only image.
      label: feature with the class, a `ClassLabel` or integers from 0; None: there is none.
      columns: features to read beside those of the image and the label; none given: all.
      size: height and width that images are resized to, after the longer side is cut to the shorter
        one, equally at both ends.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA).

    Returns:
      A source with `len`, `[i]` and `take(rows)`; with `held_out`, a pair of them.

    Raises:
      DataError: for a data set that is not prepared as ArrayRecord files, with the command that does
        it; for a missing split or feature, with the nearest one; for a feature of texts that is not
        left out; without the library.
    """
    library = _library(name)
    folder = _prepared(name, data_dir)
    _check_features(folder)
    builder = guarded(lambda: library.builder_from_directory(folder), str(folder))
    kinds = {key: _kind(library, feature) for key, feature in builder.info.features.items()}
    wanted = {"image": image, "label": label, "columns": columns}
    chosen = choose(kinds, where=name, **wanted)
    reader = ImageReader(size, channels)
    parts = (split,) if held_out is None else (split, held_out)
    for part in parts:
        check_split(part, list(builder.info.splits), name)
    for found in builder.info.splits.values():
        for file in found.filepaths:
            if not within(str(file), folder):
                raise DataError(f"{folder / _INFO} names the file {file}; expected one in {folder}")
    sources = tuple(TfdsRows(folder, part, chosen, reader) for part in parts)
    return sources[0] if held_out is None else sources


cast(Any, tfds_data).image_reader = image_reader  # how predict reads an image


class TfdsRows:
    """A source of the examples of a split.

    Args:
      folder: of a version of a data set that TFDS prepared, with ArrayRecord files.
      split: name of the split, or a part of it.
      columns: what to read.
      reader: reads the images.

    Raises:
      DataError: for a split that cannot be read.
    """

    takes_rows = True

    def __init__(self, folder: Path, split: str, columns: list[Column], reader: ImageReader):
        self._folder, self._split = folder, split
        self._columns, self._reader = columns, reader
        self._rows: Any = None  # opened in each process
        self._count = len(self._opened())

    @property
    def classes(self) -> int | None:
        """The number of classes of a `ClassLabel`."""
        return next((c.kind.classes for c in self._columns if c.name == "label"), None)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"the index is {index}; expected 0 to {len(self) - 1}")
        return one_of(self.take, index)

    def take(self, rows: np.ndarray) -> Batch:
        """Return the examples with these indices as a batch.

        Raises:
          DataError: for a damaged record or image, and for arrays that differ in shape.
        """
        indices = [int(row) for row in rows]
        found = guarded(lambda: self._opened().__getitems__(indices), f"a record of {self._folder}")
        return stack_rows(found, self._columns, self._reader)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}  # for a worker process

    def _opened(self) -> Any:
        if self._rows is None:
            library = _library(self._folder.parent.name)
            read = [column.column for column in self._columns if column.kind.of != "images"]

            def opened() -> Any:
                builder = library.builder_from_directory(self._folder)
                # The bytes of images, which are decoded as in a folder of images.
                raw = {
                    name: library.decode.SkipDecoding()
                    for name in builder.info.features
                    if name not in read
                }
                return builder.as_data_source(self._split, decoders=raw)

            self._rows = guarded(opened, f"{self._folder} ({self._split})")
        return self._rows


def _library(name: str) -> Any:
    try:
        import tensorflow_datasets
    except ImportError:
        raise DataError(
            f"{name} is data of TFDS; expected tensorflow-datasets: pip install 'jmp-train[tfds]'"
        ) from None
    return tensorflow_datasets


def _prepared(name: str, data_dir: str | None) -> Path:
    """Return the folder of a version of a data set.

    Raises:
      DataError: if it is not prepared as ArrayRecord files.
    """
    parsed = _NAME.fullmatch(name)
    if parsed is None:
        raise DataError(
            f"the name is {name!r}; expected one such as mnist, mnist:3.0.1 or NAME/CONFIG"
        )
    called, config, version = parsed.groups()
    place = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = Path(place).expanduser()
    base = root / called / config if config else root / called
    versions = [v for v in _folders(base) if _VERSION.fullmatch(v) and (base / v / _INFO).is_file()]
    if version in versions or (version is None and versions):
        folder = base / (version or max(versions, key=lambda v: [int(n) for n in v.split(".")]))
        info = read_json(folder / _INFO)
        others = info.get("alternativeFileFormats")
        formats = [info.get("fileFormat"), *(others if isinstance(others, list) else [])]
        if "array_record" in formats:
            return folder
        raise DataError(
            f"{folder} has {formats[0] or 'tfrecord'} files; expected ArrayRecord files in another "
            f"data_dir: {_command(name, root / 'array_record')}"
        )
    near = ""
    if version is not None and versions:
        near = f"; {nearest(version, versions)}"
    elif not config and _folders(base):
        near = f"; expected NAME/CONFIG, of the configurations {', '.join(_folders(base))}"
    elif nearest(called, _folders(root)).startswith("did you mean"):
        near = f"; {nearest(called, [f for f in _folders(root) if f != called] or _folders(root))}"
    raise DataError(
        f"{name} is not prepared in {root}{near}; to prepare it: {_command(name, root)}"
    )


def _folders(place: Path) -> list[str]:
    try:
        return sorted(p.name for p in place.iterdir() if p.is_dir())
    except OSError:
        return []


def _command(name: str, root: Path) -> str:
    code = (
        f"import tensorflow_datasets as tfds; tfds.builder({name!r}, data_dir={str(root)!r}, "
        "file_format='array_record').download_and_prepare()"
    )
    return f'python -c "{code}"'


def _check_features(folder: Path) -> None:
    """Raise DataError for features whose classes are not of the library, which would import them."""

    def check(value: Any) -> None:
        if isinstance(value, list):
            for item in value:
                check(item)
        if isinstance(value, Mapping):
            for key, item in value.items():
                known = isinstance(item, str) and item.startswith(_OWN_FEATURES)
                if key in ("pythonClassName", "python_class_name") and not known:
                    raise DataError(
                        f"{folder / _FEATURES} has the feature {item!r}; expected those of TFDS"
                    )
                check(item)

    check(read_json(folder / _FEATURES))


def _kind(library: Any, feature: Any) -> Kind:
    """Return what a feature of TFDS has."""
    features, called = library.features, type(feature).__name__
    if type(feature) is features.ClassLabel:
        return Kind("classes", called, feature.num_classes)
    if type(feature) is features.Image:
        whole = feature.np_dtype == np.uint8
        return Kind("images" if whole else "other", f"{called} of {feature.np_dtype}")
    if type(feature) in (features.Tensor, features.Scalar, features.BBoxFeature):
        dtype = np.dtype(feature.np_dtype)
        if dtype.kind in "iu" and not feature.shape:
            return Kind("integers", str(dtype))
        return Kind("numbers" if dtype.kind in "biuf" else "other", str(dtype))
    return Kind("other", called)
