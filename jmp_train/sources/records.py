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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jmp_train.errors import DataError
from jmp_train.sources.files import check_folder, named, within
from jmp_train.types import Batch, Json

INDEX = "records.json"
VERSION = 1
_OPEN = 64  # files of a source that stay open in a process
PARTS = ("train", "held_out")


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
                    f"{self._files[number]} has {found} records; expected {count}, as {INDEX} says: "
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
            raise DataError(
                f"{file} is missing from the folder; expected the files that {INDEX} names"
            )
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
    parts = [folder / name for name in PARTS]
    if all(part.is_dir() for part in parts) and not (folder / INDEX).exists():
        if held_out is not None:
            raise DataError(
                f"{folder} has held-out examples in {parts[1]}; expected no held_out beside it"
            )
        for part in parts:
            if not within(part, folder):
                raise DataError(
                    f"{part} is a link that leads out of {folder}; expected a folder in it"
                )
        return tuple(map(Records, parts))
    train = Records(folder)
    return train if held_out is None else (train, Records(named(held_out)))


def _read_index(folder: Path) -> Json:
    """Return the index of a folder.

    Raises:
      DataError: for none, or for one that `write_records` does not write.
    """
    file = folder / INDEX
    if not file.is_file():
        raise DataError(
            f"{folder} has no {INDEX}; expected a folder that jmp-train pack or write_records wrote"
        )
    try:
        index = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(index, dict) or not _is_index(index):
        raise DataError(f"{file} is damaged; expected the index that jmp-train pack writes")
    if index["version"] > VERSION:
        raise DataError(
            f"{file} has the version {index['version']}; expected {VERSION}, of this jmp_train"
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
