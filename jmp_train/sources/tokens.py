"""Tokens of texts: the protocol of a tokenizer, bytes as tokens, and tokens of documents in a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from jmp_train.errors import DataError


class Tokens(Protocol):
    """Protocol of a tokenizer whose tokens stand for bytes, and one of them for the end of a document."""

    end: int
    """The token before the first document and after each one."""
    sizes: np.ndarray
    """int32 (tokens,): number of bytes that each token stands for; 0 for the end of a document."""

    def encode(self, texts: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Yield the tokens of each text, in the narrowest dtype for all tokens."""
        ...

    def decode(self, tokens: np.ndarray) -> bytes:
        """Return the bytes that tokens stand for."""
        ...


def token_dtype(count: int) -> np.dtype:
    """Return the narrowest dtype of `count` tokens: uint8, uint16 or int32.

    >>> token_dtype(256), token_dtype(4096), token_dtype(2**16 + 1)
    (dtype('uint8'), dtype('uint16'), dtype('int32'))
    """
    return np.dtype("uint8" if count <= 2**8 else "uint16" if count <= 2**16 else "int32")


class ByteTokens:
    """Bytes as tokens; a zero byte, which texts do not have, ends a document.

    The vocabulary of 256 remains, so that models, files and prompts of bytes need no other case.

    >>> tokens = ByteTokens()
    >>> (ids,) = tokens.encode([b"ab"])
    >>> ids, tokens.decode(ids), int(tokens.sizes[ids].sum())
    (array([97, 98], dtype=uint8), b'ab', 2)
    """

    end = 0

    def __init__(self) -> None:
        self.sizes = np.ones(256, np.int32)
        self.sizes[self.end] = 0

    def encode(self, texts: Iterable[bytes]) -> Iterator[np.ndarray]:
        for text in texts:
            if b"\0" in text:
                raise DataError(
                    f"the text has a zero at byte {text.index(0)}; expected none, because it marks "
                    "the end of a document"
                )
            yield np.frombuffer(text, np.uint8)

    def decode(self, tokens: np.ndarray) -> bytes:
        return np.asarray(tokens).astype(np.uint8).tobytes().replace(b"\0", b"")


class TokenStream(NamedTuple):
    """Tokens of documents: an end, then the tokens and the end of each document."""

    ids: np.ndarray
    """(tokens,), in the narrowest dtype."""
    bounds: np.ndarray
    """int64 (documents + 1,): document i has the tokens `ids[bounds[i] + 1 : bounds[i + 1] + 1]`, the
    last of which is the end; `ids[bounds[i]]` is what precedes it, the end of another."""


def stream_of(documents: Iterable[bytes], tokens: Tokens, *, ended: bool = True) -> TokenStream:
    """Return the tokens of documents.

    Args:
      documents: at least one text.
      tokens: the tokenizer.
      ended: whether the last document is whole; otherwise no end follows it.

    >>> stream = stream_of([b"ab", b"c"], ByteTokens())
    >>> stream.ids.tolist(), stream.bounds.tolist()
    ([0, 97, 98, 0, 99, 0], [0, 3, 5])
    """
    end = np.array([tokens.end], token_dtype(len(tokens.sizes)))
    parts = [end]
    counts = []
    for ids in tokens.encode(documents):
        parts += [ids, end]
        counts.append(len(ids) + 1)
    if not ended:
        parts.pop()
        counts[-1] -= 1
    return TokenStream(np.concatenate(parts), np.cumsum([0, *counts], dtype=np.int64))


def until_end(tokens: np.ndarray, end: int) -> np.ndarray:
    """Return the tokens before the first end of a document.

    >>> until_end(np.array([3, 1, 0, 2]), 0).tolist()
    [3, 1]
    """
    (ends,) = np.nonzero(tokens == end)
    return tokens[: ends[0]] if len(ends) else tokens
