"""Text as bytes: English text that Python includes, or a file."""

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

from jmp_train.data.dataset import Dataset
from jmp_train.data.files import check_file
from jmp_train.fields import check_fields
from jmp_train.spec import DataSpec
from jmp_train.types import Batch

_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 9, mtime=0),
    "bz2": lambda data: bz2.compress(data, 9),
    "lzma": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
}
_LARGEST_COMPRESSED = 2**22  # lzma takes about a second for a megabyte


def documentation() -> bytes:
    """Return the documentation topics of Python's `help()`, in the order of their names.

    The text has about 466,000 bytes of English in Python 3.11; other versions of Python have other
    texts.
    """
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics)).encode()


def compression_baselines(train: bytes, held_out: bytes) -> dict[str, dict[str, float]]:
    """Return the compressed size of a text in bits per byte, by general compressors.

    Args:
      train: training text, which precedes the held-out text.
      held_out: text to measure.

    Returns:
      Two figures for each compressor (gzip, bz2 and lzma, each at its highest level). `"alone"` is
      the size of the held-out text compressed by itself. `"after_training_text"` is the increase of
      the compressed size when the held-out text is appended to the training text: the size for a
      compressor that, like a model, has seen the training text. gzip looks back only 32 KiB.

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
    """Bytes of Python's documentation topics, or of a text file."""

    name: ClassVar[str] = "text"

    path: str = ""
    """Path of a text file; empty: the documentation topics that Python includes."""
    length: int = 128
    """Context length in bytes."""
    eval_share: float = 0.1
    """Fraction of the text to hold out, from its end."""

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
        """Load windows of length + 1 bytes, uint8: inputs are all but the last byte, targets all but
        the first.

        Training: the training text is divided into as many equal parts as there are disjoint
        windows. Each epoch takes one window from each part, with a new random start in the part.

        Evaluation: windows start half a length apart, and only the second half of each is scored.
        Every held-out byte is therefore predicted exactly once, after at least half a length of
        text. The text before the first held-out bytes is the end of the training text.

        Raises:
          ValueError: if the text is too short for the length.
        """
        text = Path(self.path).read_bytes() if self.path else documentation()
        data = np.frombuffer(text, np.uint8)
        split = len(data) - round(self.eval_share * len(data))
        if split < self.length + 1 or split == len(data):
            raise ValueError(
                f"length is {self.length}; expected less than the {split} bytes of training text, "
                f"and at least one held-out byte (there are {len(data) - split})"
            )
        held_out = _held_out_windows(data, split, self.length)
        return Dataset(
            train=Windows(data[:split], self.length),
            eval=held_out,
            spec=DataSpec.of({"tokens": held_out["tokens"]}, classes=256),
            facts=lambda: _facts(text, split),
        )


class Windows:
    """A source of windows of a text: one from each of equal parts, with a random start in the part.

    There are as many parts as disjoint windows.
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
    """Return windows that predict every byte from `split`, and a mask of the scored predictions."""
    stride = length // 2
    ends = np.minimum(np.arange(split + stride, len(data) + stride, stride), len(data))
    starts = ends - length - 1
    predicted = starts[:, None] + 1 + np.arange(length)  # index of each predicted byte
    fresh = np.concatenate([[split], ends[:-1]])  # end of the previous window
    windows = np.lib.stride_tricks.sliding_window_view(data, length + 1)
    return {"tokens": windows[starts], "mask": predicted >= fresh[:, None]}


def _facts(text: bytes, split: int) -> dict[str, Any]:
    """Return facts about a text that put results on it in context."""
    facts = {
        "sha256": hashlib.sha256(text).hexdigest(),
        "training_bytes": split,
        "held_out_bytes": len(text) - split,
    }
    if len(text) <= _LARGEST_COMPRESSED:
        facts["bits_per_byte_of_compressors"] = compression_baselines(text[:split], text[split:])
    return facts
