"""Text as bytes: real English that ships with Python, or a file."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import hashlib
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jmp_train.data.dataset import Batch, Dataset
from jmp_train.data.files import check_file
from jmp_train.fields import check_fields
from jmp_train.spec import DataSpec

_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 9, mtime=0),
    "bz2": lambda data: bz2.compress(data, 9),
    "lzma": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
}
_LARGEST_COMPRESSED = 2**22  # lzma takes about a second for a megabyte


def documentation() -> bytes:
    """The documentation topics that CPython ships for `help()`, in the order of their names.

    About 466,000 bytes of English in Python 3.11; another version of Python has another text.
    """
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics)).encode()


def compression_baselines(train: bytes, held_out: bytes) -> dict[str, dict[str, float]]:
    """What general compressors need for a text, in bits for each of its bytes.

    Args:
      train: what comes before.
      held_out: the text that is measured.

    Returns:
      By compressor (gzip, bz2, lzma, each at its highest level): `"alone"`, the held-out text by
      itself; `"after_training_text"`, how much longer the compressed training text grows by it,
      which is what a compressor needs that has read the training text first, as a model has.
      gzip looks back only 32 KiB.

    >>> baselines = compression_baselines(b"spam and eggs. " * 40, b"spam and eggs. " * 2)
    >>> baselines["gzip"]["alone"] > baselines["gzip"]["after_training_text"]
    True
    """
    return {
        name: {
            "alone": 8 * len(compress(held_out)) / len(held_out),
            "after_training_text": 8
            * (len(compress(train + held_out)) - len(compress(train)))
            / len(held_out),
        }
        for name, compress in _COMPRESSORS.items()
    }


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Bytes of Python's documentation topics, or of a file."""

    name: ClassVar[str] = "text"

    path: str = ""
    """Text file to use instead of the documentation topics that ship with Python."""
    length: int = 128
    """Bytes that the model sees at once."""
    eval_share: float = 0.1
    """Share of the text that is held out: its end."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.length < 2:
            raise ValueError(f"length is {self.length}; expected at least 2")
        if not 0 < self.eval_share < 1:
            raise ValueError(f"eval_share is {self.eval_share}; expected 0 < eval_share < 1")
        if "\0" in self.path:
            raise ValueError(f"path is {self.path!r}; expected the name of a text file")
        if self.path:
            check_file(Path(self.path), "text")

    def load(self) -> Dataset:
        """Windows of length + 1 bytes, uint8: all but the last are seen, all but the first predicted.

        Training: each epoch takes one window from each of equal parts of the training text, as many
        as windows would fit side by side, its start drawn anew in that part. Evaluation: windows
        half a length apart, in which only the last half is scored, so that every held-out byte is
        predicted exactly once and has at least half a length of text before it; before the first
        held-out bytes that is the end of the training text.

        Raises:
          ValueError: for a text that is too short for the length.
        """
        text = Path(self.path).read_bytes() if self.path else documentation()
        data = np.frombuffer(text, np.uint8)
        split = len(data) - round(self.eval_share * len(data))
        if split < self.length + 1 or split == len(data):
            raise ValueError(
                f"length is {self.length}; expected less than the {split} bytes of training text, "
                f"and at least one of the {len(data) - split} held-out ones"
            )
        held_out = _held_out_windows(data, split, self.length)
        return Dataset(
            train=Windows(data[:split], self.length),
            eval=held_out,
            spec=DataSpec.of({"tokens": held_out["tokens"]}, classes=256),
            facts=lambda: _facts(text, split),
        )


class Windows:
    """Windows of a text: one from each of equal parts, its start drawn anew each time.

    There are as many parts as windows would fit side by side.
    """

    def __init__(self, text: np.ndarray, length: int):
        self._windows = np.lib.stride_tricks.sliding_window_view(text, length + 1)
        self._parts = max(len(self._windows) // length, 1)

    def __len__(self) -> int:
        return self._parts

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        size = len(self._windows) / self._parts
        start = ((rows + rng.random(rows.shape)) * size).astype(np.int64)
        return {"tokens": self._windows[np.minimum(start, len(self._windows) - 1)]}


def _held_out_windows(data: np.ndarray, split: int, length: int) -> dict[str, np.ndarray]:
    """Windows that predict every byte from `split` on, and which of their predictions count."""
    stride = length // 2
    ends = np.minimum(np.arange(split + stride, len(data) + stride, stride), len(data))
    starts = ends - length - 1
    predicted = starts[:, None] + 1 + np.arange(length)  # the place of each predicted byte
    fresh = np.concatenate([[split], ends[:-1]])  # where the last window left off
    windows = np.lib.stride_tricks.sliding_window_view(data, length + 1)
    return {"tokens": windows[starts], "mask": predicted >= fresh[:, None]}


def _facts(text: bytes, split: int) -> dict[str, Any]:
    """What a result on this text must be read with."""
    facts = {
        "sha256": hashlib.sha256(text).hexdigest(),
        "training_bytes": split,
        "held_out_bytes": len(text) - split,
    }
    if len(text) <= _LARGEST_COMPRESSED:
        facts["bits_per_byte_of_compressors"] = compression_baselines(text[:split], text[split:])
    return facts
