"""ArrayRecord files are written, for `jmp_train.sources.records` to read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jmp_train.data.dataset import Arrays, DataError, Dataset
from jmp_train.data.examples import Examples, Rows
from jmp_train.sources.records import INDEX, PARTS, VERSION
from jmp_train.types import Batch
from jmp_train.whole_folder import appearing, check_new

_DTYPES = ("bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "float32")


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
    >>> from jmp_train.sources.records import Records
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
    parts = dict(zip(PARTS, (_items(dataset.train), _items(dataset.eval)), strict=True))
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
        "version": VERSION,
        "classes": classes,
        **({} if names_of is None else {"class_names": names_of}),
        "shards": [{"file": n, "examples": s} for n, s in zip(names, sizes, strict=True)],
    }
    (place / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return [*names, INDEX]


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


def _storable(example: Batch) -> dict[str, np.ndarray]:
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
