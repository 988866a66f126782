"""Documents in rows of one length, several in a row, so that little of a row is padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jmp_train.sources.tokens import TokenStream
from jmp_train.types import Batch


class Pieces(NamedTuple):
    """Parts of documents, each of at most one row's length."""

    starts: np.ndarray
    """int64 (pieces,): the token before the first that is predicted."""
    sizes: np.ndarray
    """int64 (pieces,): number of predicted tokens."""


def pieces_of(bounds: np.ndarray, length: int) -> Pieces:
    """Return documents as pieces: those that are longer than a row in pieces of a row, and a rest.

    >>> pieces_of(np.array([0, 3, 13]), 4)
    Pieces(starts=array([ 0,  3,  7, 11]), sizes=array([3, 4, 4, 2]))
    """
    sizes = np.diff(bounds)
    counts = -(-sizes // length)  # rounded up
    first = np.repeat(np.cumsum(counts) - counts, counts)
    offsets = (np.arange(counts.sum()) - first) * length
    starts = np.repeat(bounds[:-1], counts) + offsets
    return Pieces(starts, np.minimum(np.repeat(sizes, counts) - offsets, length))


def best_fit(pieces: Pieces, length: int, joins: np.ndarray, closes: np.ndarray) -> list[list[int]]:
    """Assign pieces to rows: the longest first, each to the fullest row that has room for it.

    Args:
      pieces: the pieces.
      length: number of predictions in a row.
      joins: bool (pieces,), whether a piece begins with the token that ends another; one that does
        not takes one more place after another.
      closes: bool (pieces,), whether a piece cannot be followed by another in its row.

    Returns:
      The indices of the pieces in each row. The same pieces give the same rows.

    Source: best-fit packing of Ding et al. 2024, "Fewer Truncations Improve Language Modeling",
    arXiv:2404.10830, section 3.

    >>> pieces = Pieces(np.zeros(4, int), np.array([3, 5, 2, 4]))
    >>> best_fit(pieces, 7, np.ones(4, bool), np.zeros(4, bool))
    [[1, 2], [3, 0]]
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [
        [] for _ in range(length + 1)
    ]  # the rows with so many free places
    free = 0  # bit n: whether a row has n free places
    order = np.argsort(-pieces.sizes, kind="stable").tolist()
    sizes, joined, closed = pieces.sizes.tolist(), joins.tolist(), closes.tolist()
    for piece in order:
        need = sizes[piece] + (not joined[piece])
        large = free >> need
        if large:
            room = need + (large & -large).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                free &= ~(1 << room)
            rows[row].append(piece)
            left = room - need
        else:
            row, left = len(rows), length - sizes[piece]
            rows.append([piece])
        if left and not closed[piece]:
            with_room[left].append(row)
            free |= 1 << left
    return rows


class PackedRows:
    """A source of rows of documents.

    An example is a dict of `tokens`, (length + 1,); `segments`, int32 (length,): the number of the
    document, from 1, of each token but the last, and 0 for padding; `mask`, bool (length,): whether the
    token after it is predicted; and `target_bytes`, int32 (length,): the bytes of that token.

    A document begins after an end, and its own end is predicted, so every token of every document is
    predicted once. The end of a document is the token that the next one in the row begins after, so
    that no prediction crosses documents. A rest of a long document begins after the last token of the
    part before it; in a row with another document, the prediction of that token is masked.

    Args:
      stream: the tokens of the documents.
      length: number of predictions in a row.
      end: the token of the end of a document.
      sizes: int32, number of bytes of each token.

    >>> from jmp_train.sources.tokens import ByteTokens, stream_of
    >>> tokens = ByteTokens()
    >>> rows = PackedRows(stream_of([b"ab", b"c"], tokens), 6, tokens.end, tokens.sizes)
    >>> {name: x[0].tolist() for name, x in rows.draw(np.array([0])).items() if name != "target_bytes"}
    {'tokens': [0, 97, 98, 0, 99, 0, 0], 'segments': [1, 1, 1, 2, 2, 0], \
'mask': [True, True, True, True, True, False]}
    """

    in_memory = True

    def __init__(self, stream: TokenStream, length: int, end: int, sizes: np.ndarray):
        self._ids, self._length, self._end, self._bytes = stream.ids, length, end, sizes
        pieces = pieces_of(stream.bounds, length)
        joins = stream.ids[pieces.starts] == end
        closes = stream.ids[pieces.starts + pieces.sizes] != end
        rows = best_fit(pieces, length, joins, closes)
        order = np.array([piece for row in rows for piece in row], np.int64)
        self._pieces = Pieces(pieces.starts[order], pieces.sizes[order])
        self._joins = joins[order]
        self._first = np.cumsum([0, *map(len, rows)])

    def __len__(self) -> int:
        return len(self._first) - 1

    def draw(self, rows: np.ndarray, rng: np.random.Generator | None = None) -> Batch:
        """Return rows as a batch; there are no random numbers in it."""
        del rng
        count, length = len(rows), self._length
        tokens = np.full((count, length + 1), self._end, self._ids.dtype)
        segments = np.zeros((count, length), np.int32)
        mask = np.zeros((count, length), bool)
        for place, row in enumerate(rows):
            for number, at, piece in self._places(int(row)):
                start, size = self._pieces.starts[piece], self._pieces.sizes[piece]
                tokens[place, at : at + size + 1] = self._ids[start : start + size + 1]
                segments[place, at : at + size] = number
                if at and not self._joins[piece]:  # the token before is of the document before
                    segments[place, at - 1] = number - 1
                mask[place, at : at + size] = True
        target_bytes = np.where(mask, self._bytes[tokens[:, 1:]], 0)
        return {
            "tokens": tokens,
            "segments": segments,
            "mask": mask,
            "target_bytes": target_bytes.astype(np.int32),
        }

    def all(self) -> Batch:
        """Return all rows."""
        return self.draw(np.arange(len(self)))

    def _places(self, row: int) -> Iterator[tuple[int, int, int]]:
        """Yield the number in its row, the place and the index of each piece of a row."""
        at = 0
        for number, piece in enumerate(range(self._first[row], self._first[row + 1]), 1):
            at += bool(at) and not self._joins[piece]
            yield number, at, piece
            at += int(self._pieces.sizes[piece])
