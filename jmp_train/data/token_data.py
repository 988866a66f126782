"""Documents as data: their tokenizer, trained or that of a run, and windows or packed rows of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jmp_train.data.dataset import DataError, Dataset
from jmp_train.data.packing import PackedRows
from jmp_train.data.windows import Windows, held_out_windows
from jmp_train.sources.bpe import read_bpe, train_bpe
from jmp_train.sources.documents import Parts
from jmp_train.sources.tokens import ByteTokens, Tokens, stream_of
from jmp_train.spec import DataSpec
from jmp_train.types import Batch

TOKENIZER = "tokenizer.json"
_SOURCE = "tokenizer_source.json"  # digests of the tokenizer and of the text that it was trained on


class DocumentSettings(NamedTuple):
    """Settings of `TextConfig`, with its names."""

    length: int
    eval_share: float
    tokenizer: Literal["bytes", "bpe"]
    vocabulary: int
    packed: bool


def load_documents(
    parts: Parts,
    settings: DocumentSettings,
    run_dir: Path | None,
    facts: Callable[[], dict[str, Any]],
) -> Dataset:
    """Return documents as tokens.

    Args:
      parts: training and held-out documents.
      settings: the tokenizer and the rows.
      run_dir: directory of a run, whose tokenizer is used if it has one; None: train one.
      facts: returns facts about the text.

    Raises:
      DataError: for too little text, and a damaged tokenizer.
    """
    length = settings.length
    if not parts.train or not parts.held_out:
        what = "to train on" if not parts.train else "held out"
        raise DataError(
            f"eval_share {settings.eval_share:g} leaves no text {what}; expected at least one "
            "character of each"
        )
    tokens, files, notes = _tokenizer(parts.train, settings, run_dir)
    train = stream_of(parts.train, tokens, ended=not parts.cut)
    held_out = stream_of(parts.held_out, tokens)
    counts = {
        "documents": len(parts.train) + len(parts.held_out) - parts.cut,
        "vocabulary": len(tokens.sizes),
        "training_tokens": len(train.ids),
        "held_out_tokens": len(held_out.ids) - 1,
    }
    if settings.packed:
        source: Any = PackedRows(train, length, tokens.end, tokens.sizes)
        arrays = PackedRows(held_out, length, tokens.end, tokens.sizes).all()
    else:
        split = len(train.ids)
        if split < length + 1:
            raise DataError(
                f"length is {length}; expected less than the {split} tokens of training text"
            )
        ids = np.concatenate([train.ids, held_out.ids[1:]])
        source = SizedWindows(ids[:split], length, tokens.sizes)
        arrays = _with_bytes(held_out_windows(ids, split, length), tokens.sizes)
    return Dataset(
        train=source,
        eval=arrays,
        spec=DataSpec.of({"tokens": arrays["tokens"]}, classes=len(tokens.sizes)),
        facts=lambda: {**facts(), **counts},
        files=files,
        notes=notes,
    )


def tokens_of_run(kind: Literal["bytes", "bpe"], run_dir: Path) -> Tokens:
    """Return the tokenizer that a run was trained with.

    Raises:
      DataError: if it cannot be read.
    """
    return ByteTokens() if kind == "bytes" else read_bpe(run_dir / TOKENIZER)


class SizedWindows(Windows):
    """Windows with `target_bytes`, int32 (batch, length): the bytes that each target stands for."""

    def __init__(self, ids: np.ndarray, length: int, sizes: np.ndarray):
        super().__init__(ids, length)
        self._sizes = sizes

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        return _with_bytes(super().draw(rows, rng), self._sizes)


def _with_bytes(batch: Batch, sizes: np.ndarray) -> Batch:
    return {**batch, "target_bytes": sizes[batch["tokens"][:, 1:]]}


def _tokenizer(
    texts: list[bytes], settings: DocumentSettings, run_dir: Path | None
) -> tuple[Tokens, dict[str, str], tuple[str, ...]]:
    """Return a tokenizer, the files that a run keeps of it, and lines about it."""
    if settings.tokenizer == "bytes":
        return ByteTokens(), {}, ()
    digest = _digest(texts)
    if run_dir is not None and (run_dir / TOKENIZER).exists():
        bpe = read_bpe(run_dir / TOKENIZER)
        return bpe, {}, tuple(_changes(run_dir, digest))
    bpe = train_bpe(texts, settings.vocabulary)
    content = bpe.to_json()
    source = {"tokenizer_sha256": _digest([content.encode()]), "training_text_sha256": digest}
    notes = ()
    if run_dir is not None and (run_dir / "config.json").exists():
        notes = (f"{run_dir} had no {TOKENIZER}; it was trained again on the training text",)
    return bpe, {TOKENIZER: content, _SOURCE: json.dumps(source, indent=2) + "\n"}, notes


def _changes(run_dir: Path, digest: str) -> list[str]:
    """Return lines about a tokenizer that changed, or whose text did, since a run began."""
    path = run_dir / TOKENIZER
    try:
        source = dict(json.loads((run_dir / _SOURCE).read_text(encoding="utf-8")))
        content = path.read_bytes()
    except (OSError, ValueError, TypeError, RecursionError):
        return []  # nothing to compare with
    lines = []
    if source.get("tokenizer_sha256") != _digest([content]):
        lines.append(f"{path} differs from the one that the run began with; it is used as it is")
    if source.get("training_text_sha256") != digest:
        lines.append(f"{path} was trained on another text than this one; it is used as it is")
    return lines


def _digest(texts: Iterable[bytes]) -> str:
    """Return the SHA-256 of texts, each after its length."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}\n".encode())
        digest.update(text)
    return digest.hexdigest()
