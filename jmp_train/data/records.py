"""ArrayRecord files: examples that are read at random from disk, each a dict of arrays in a record.

A record holds an example in the safetensors format. Beside the files, `records.json` tells their names,
their numbers of examples and the number of classes.
"""

from __future__ import annotations

import bisect
import collections
import errno
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jmp_train.data.dataset import Arrays, DataError, Dataset
from jmp_train.data.examples import Examples, Rows
from jmp_train.data.files import check_folder, named
from jmp_train.types import Batch, Json
from jmp_train.whole_folder import appearing, check_new

_INDEX = "records.json"
_VERSION = 1
_OPEN = 64  # files of a source that stay open in a process
_PARTS = ("train", "held_out")
_DTYPES = ("bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "float32")


class Records:
    """A source of the examples in a folder of ArrayRecord files.

    Args:
      path: folder that `write_records` wrote.

    Raises:
      DataError: for another folder, and for missing or damaged files.
    """

    def __init__(self, path: str | Path):
        self._folder = Path(path)
        check_folder(self._folder)
        index = _read_index(self._folder)
        self.classes: int | None = index["classes"]
        names = index.get("class_names")
        self.class_names: tuple[str, ...] | None = None if names is None else tuple(names)
        self._files = [self._folder / shard["file"] for shard in index["shards"]]
        counts = [shard["examples"] for shard in index["shards"]]
        self._starts = [0, *itertools.accumulate(counts)]
        self.__setstate__({})
        for number, count in enumerate(counts):
            found = self._reader(number).num_records()
            if found != count:
                raise DataError(
                    f"{self._files[number]} has {found} records; expected {count}, as {_INDEX} says: "
                    "it is damaged, or of other files"
                )

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Batch:
        from safetensors.numpy import load

        if not 0 <= index < len(self):
            raise IndexError(f"the index is {index}; expected 0 to {len(self) - 1}")
        shard = bisect.bisect_right(self._starts, index) - 1
        record = index - self._starts[shard]
        try:
            return load(self._reader(shard).read([record])[0])
        except DataError:
            raise
        except Exception as error:  # the reader and the parser raise many types for damaged files
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"{self._files[shard]}: record {record} is damaged: {what}") from error

    def describe(self, index: int) -> str:
        """Return the file and the number of an example's record."""
        shard = bisect.bisect_right(self._starts, index) - 1
        return f"{self._files[shard]}: record {index - self._starts[shard]}"

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}
        return kept  # for a worker process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def _reader(self, shard: int) -> Any:
        """Return the reader of a file. The last ones stay open; another ends with its last reading."""
        with self._lock:
            reader = self._readers.pop(shard, None) or self._open(self._files[shard])
            self._readers[shard] = reader
            if len(self._readers) > _OPEN:
                self._readers.popitem(last=False)
            return reader

    def _open(self, file: Path) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        if file.is_symlink() or not file.is_file():
            raise DataError(f"{file} is no file of the folder; expected those that {_INDEX} names")
        try:
            file.open("rb").close()  # the reader's own error for this would look like damage
            # Without its own threads: the worker processes and threads read beside each other.
            return ArrayRecordReader(str(file), options="readahead_buffer_size:0")
        except OSError as error:
            hint = "; expected a larger limit, ulimit -n" if error.errno == errno.EMFILE else ""
            raise DataError(f"{file} cannot be read: {error.strerror}{hint}") from None
        except Exception as error:
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"{file} is no ArrayRecord file: {what}") from error


def array_records(path: str, held_out: str | None = None) -> Any:
    """Return the examples in ArrayRecord files, for `jt.Data`.

    Args:
      path: folder that `write_records` or `jmp-train pack` wrote. If it has the folders train and
        held_out, these are the examples to train on and those that are held out.
      held_out: another such folder, with the held-out examples; None: a fraction of `path` is held out,
        unless it has them.

    Raises:
      DataError: as `Records`.
    """
    folder = named(path)
    check_folder(folder)
    parts = [folder / name for name in _PARTS]
    if all(part.is_dir() for part in parts) and not (folder / _INDEX).exists():
        if held_out is not None:
            raise DataError(
                f"{folder} has held-out examples in {parts[1]}; expected no held_out beside it"
            )
        return tuple(map(Records, parts))
    train = Records(folder)
    return train if held_out is None else (train, Records(named(held_out)))


def write_records(
    examples: Any,
    folder: str | Path,
    *,
    shards: int = 1,
    classes: int | None = None,
    class_names: tuple[str, ...] | None = None,
) -> list[Path]:
    """Write examples into ArrayRecord files, in their order.

    Args:
      examples: has `len`, and `[i]` returns a dict of arrays.
      folder: folder to write; it appears when all is written.
      shards: number of files, of about equally many examples.
      classes: number of classes, to be kept with them.
      class_names: name of each class, to be kept with them.

    Returns:
      The files, of which the last is the index.

    Raises:
      DataError: for an existing folder, for less than one shard or more shards than examples, and for
        an example that cannot be read or stored.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "packed"
    >>> rows = [{"x": np.arange(3.0) + i, "label": np.int32(i % 2)} for i in range(10)]
    >>> [file.name for file in write_records(rows, folder, shards=2)]
    ['00000-of-00002.array_record', '00001-of-00002.array_record', 'records.json']
    >>> records = Records(folder)
    >>> len(records), records[7]["x"], records[7]["label"]
    (10, array([7., 8., 9.], dtype=float32), array(1, dtype=int32))
    """
    folder = Path(folder)
    check_new(folder)
    with appearing(folder) as place:
        files = _write_part(examples, place, shards, classes, class_names)
    return [folder / name for name in files]


def pack(dataset: Dataset, folder: str | Path, *, shards: int = 1) -> dict[str, int]:
    """Write the examples of a data set into ArrayRecord files, those that are held out too.

    They are written as they are read, before the transforms of the experiment, which stay in an
    experiment that reads the files.

    Args:
      dataset: what the `load` of an experiment's data returns; no stream.
      folder: folder to write, for `array_records`; it appears when all is written.
      shards: number of files for the examples to train on, and for those that are held out; of fewer
        examples, as many as there are.

    Returns:
      The number of examples of each part.

    Raises:
      DataError: as `write_records`, and for a stream.
    """
    folder = Path(folder)
    check_new(folder)
    parts = dict(zip(_PARTS, (_items(dataset.train), _items(dataset.eval)), strict=True))
    with appearing(folder) as place:
        for name, items in parts.items():
            of_part = min(shards, max(len(items), 1))
            spec = dataset.spec
            _write_part(items, place / name, of_part, spec.class_count, spec.class_names)
    return {name: len(items) for name, items in parts.items()}


def _items(source: Any) -> Any:
    """Return the examples of a source, one at a time and untransformed."""
    if isinstance(source, Examples):
        return source.untransformed()
    if isinstance(source, Arrays):
        return Rows(source.arrays)
    if isinstance(source, dict):
        return Rows(source)
    raise DataError(
        "the data are a stream, which has no number of examples; expected data with len and [i]"
    )


def _write_part(
    items: Any, place: Path, shards: int, classes: int | None, names_of: tuple[str, ...] | None
) -> list[str]:
    """Write examples and their index; return the names of the files."""
    count = len(items)
    if not 1 <= shards <= count:
        raise DataError(f"shards is {shards}; expected 1 to {count}, the number of examples")
    place.mkdir(exist_ok=True)
    bounds = [count * n // shards for n in range(shards + 1)]
    names = [f"{n:05}-of-{shards:05}.array_record" for n in range(shards)]
    source = items if isinstance(items, Examples) else Examples(items)
    for name, start, stop in zip(names, bounds, bounds[1:], strict=False):
        _write_file(place / name, (source.one(i) for i in range(start, stop)))
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    index = {
        "version": _VERSION,
        "classes": classes,
        **({} if names_of is None else {"class_names": names_of}),
        "shards": [{"file": n, "examples": s} for n, s in zip(names, sizes, strict=True)],
    }
    (place / _INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return [*names, _INDEX]


def _write_file(path: Path, examples: Iterator[Batch]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter
    from safetensors.numpy import save

    # Records in groups of one are read at random without the others of their group.
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        for example in examples:
            writer.write(save(_storable(example)))
    finally:
        writer.close()


def _storable(example: Batch) -> Batch:
    """Return an example as safetensors stores it, and reads it back.

    Raises:
      DataError: for a dtype or a name that it does not.
    """
    for name, array in example.items():
        if array.dtype.name not in _DTYPES:
            raise DataError(
                f"{name!r} has dtype {array.dtype}; expected one of {', '.join(_DTYPES)}"
            )
        if name == "__metadata__" or not name.isprintable():
            raise DataError(f"an array has the name {name!r}; expected a printable one")
    return {name: np.asarray(array, order="C") for name, array in example.items()}


def _read_index(folder: Path) -> Json:
    """Return the index of a folder.

    Raises:
      DataError: for none, or for one that `write_records` does not write.
    """
    file = folder / _INDEX
    if not file.is_file():
        raise DataError(
            f"{folder} has no {_INDEX}; expected a folder that jmp-train pack or write_records wrote"
        )
    try:
        index = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(index, dict) or not _is_index(index):
        raise DataError(f"{file} is damaged; expected the index that jmp-train pack writes")
    if index["version"] > _VERSION:
        raise DataError(
            f"{file} has the version {index['version']}; expected {_VERSION}, of this jmp_train"
        )
    return index


def _is_index(index: Json) -> bool:
    whole: Callable[[Any], bool] = lambda n: isinstance(n, int) and not isinstance(n, bool)
    shards, classes, names = map(index.get, ("shards", "classes", "class_names"))
    return (
        whole(index.get("version"))
        and (classes is None or (whole(classes) and 1 < classes < 2**31))
        and (names is None or (isinstance(names, list) and len(names) == classes))
        and all(isinstance(name, str) for name in names or ())
        and isinstance(shards, list)
        and bool(shards)
        and all(
            isinstance(shard, dict)
            and isinstance(shard.get("file"), str)
            and Path(shard["file"]).name == shard["file"]  # nothing outside the folder
            and whole(shard.get("examples"))
            and shard["examples"] > 0
            for shard in shards
        )
    )
