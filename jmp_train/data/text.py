"""Text as tokens, bytes or those of a trained tokenizer: text that Python includes, or files."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import hashlib
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from jmp_train.data.dataset import Dataset
from jmp_train.data.token_data import TOKENIZER, DocumentSettings, load_documents, tokens_of_run
from jmp_train.data.windows import Windows, held_out_windows
from jmp_train.fields import check_fields
from jmp_train.sources.bpe import LARGEST, SMALLEST
from jmp_train.sources.documents import HINT, Parts, hold_out, read_documents, split_texts
from jmp_train.sources.files import check_file, check_memory
from jmp_train.sources.tokens import Tokens, token_dtype
from jmp_train.spec import DataSpec

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
    """Text of Python's documentation topics, of a file, or of the files of a folder."""

    name: ClassVar[str] = "text"

    path: str = ""
    """Path of a text file, or of a folder of .txt, .md and other text files; empty: the documentation
    topics that Python includes."""
    length: int = 128
    """Context length in tokens."""
    eval_share: float = 0.1
    """Fraction of the text to hold out, from its end."""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """bytes: each byte is a token; bpe: byte-pair encoding, trained on the training text."""
    vocabulary: int = 4096
    """Largest number of tokens of bpe."""
    packed: bool = False
    """Whether rows have whole documents, each of which attends to itself alone; otherwise rows are
    windows of the documents one after the other."""
    separator: str = ""
    """Text between two documents of a file; empty: each file is one document."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.length < 2:
            raise ValueError(f"length is {self.length}; expected at least 2")
        if not 0 < self.eval_share < 1:
            raise ValueError(f"eval_share is {self.eval_share}; expected 0 < eval_share < 1")
        if "\0" in self.path:
            raise ValueError(f"path is {self.path!r}; expected the name of a text file")
        if not SMALLEST <= self.vocabulary <= LARGEST:
            raise ValueError(
                f"vocabulary is {self.vocabulary}; expected {SMALLEST} to {LARGEST}: 256 bytes and the "
                "end of a document are tokens"
            )
        if self.path and not os.path.isdir(self.path):
            check_file(Path(self.path), "text")

    @property
    def has_documents(self) -> bool:
        """Whether the text is documents with an end; otherwise it is bytes, of any kind."""
        return (
            self.tokenizer != "bytes"
            or self.packed
            or bool(self.separator)
            or (bool(self.path) and os.path.isdir(self.path))
        )

    def tokens_of(self, run_dir: Path) -> Tokens | None:
        """Return the tokenizer of a run on documents; None for one on bytes of any kind.

        Raises:
          DataError: if tokenizer.json cannot be read.
        """
        return tokens_of_run(self.tokenizer, run_dir) if self.has_documents else None

    @property
    def run_files(self) -> tuple[str, ...]:
        """Names of the files in a run's directory that other software needs to use its model."""
        return (TOKENIZER,) if self.tokenizer == "bpe" else ()

    def load(self, run_dir: Path | None = None) -> Dataset:
        """Load windows of length + 1 tokens: inputs are all but the last token, targets all but the
        first. Bytes are uint8; other tokens uint16 or int32.

        Training: the training text is divided into as many equal parts as there are disjoint
        windows. Each epoch takes one window from each part, with a new random start in the part.

        Evaluation: windows start half a length apart, and only the second half of each is scored.
        Every held-out byte is therefore predicted exactly once, after at least half a length of
        text. The text before the first held-out bytes is the end of the training text.

        Documents have an end token before the first and after each one. Their batches have
        `target_bytes` too, int32 (batch, length): the bytes of each target, for bits per byte. Packed
        rows have `segments` and a `mask` (`jmp_train.data.packing.PackedRows`); evaluation predicts
        every held-out token once, without the training text.

        Args:
          run_dir: the directory of a run, whose tokenizer is used if it has one; None: train one.

        Raises:
          ValueError: if the text is too short for the length, larger than the memory, or not UTF-8
            where it is documents; and for a damaged tokenizer.json.
        """
        if self.has_documents:
            settings = DocumentSettings(
                self.length, self.eval_share, self.tokenizer, self.vocabulary, self.packed
            )
            parts = hold_out(self._documents(), self.eval_share)
            return load_documents(parts, settings, run_dir, _facts_of(parts))
        if self.path:
            check_memory(Path(self.path), os.path.getsize(self.path), HINT)
        text = Path(self.path).read_bytes() if self.path else documentation()
        data = np.frombuffer(text, np.uint8)
        split = len(data) - round(self.eval_share * len(data))
        if split < self.length + 1 or split == len(data):
            raise ValueError(
                f"length is {self.length}; expected less than the {split} bytes of training text, "
                f"and at least one held-out byte (there are {len(data) - split})"
            )
        held_out = held_out_windows(data, split, self.length)
        return Dataset(
            train=Windows(data[:split], self.length),
            eval=held_out,
            spec=DataSpec.of({"tokens": held_out["tokens"]}, classes=256),
            facts=lambda: _facts(text, split),
        )

    def _documents(self) -> list[bytes]:
        if not self.path:
            from pydoc_data.topics import topics

            texts = [topics[name].encode() for name in sorted(topics)]
            return split_texts(texts, self.separator)
        tokens = 256 if self.tokenizer == "bytes" else self.vocabulary
        return read_documents(
            Path(self.path),
            self.separator,
            memory=2 + token_dtype(tokens).itemsize,  # the text, a decoded copy, and the tokens
            zero_ends=self.tokenizer == "bytes",
        )


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


def _facts_of(parts: Parts) -> Callable[[], dict[str, Any]]:
    """Return a function that returns `_facts`; a large text does not stay in memory for it."""
    train, held_out = b"".join(parts.train), b"".join(parts.held_out)
    if len(train) + len(held_out) <= _LARGEST_COMPRESSED:
        return lambda: _facts(train + held_out, len(train))
    digest = hashlib.sha256(train)
    digest.update(held_out)
    facts = {
        "sha256": digest.hexdigest(),
        "training_bytes": len(train),
        "held_out_bytes": len(held_out),
    }
    return lambda: facts
