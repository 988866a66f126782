"""Packed rows: every token of every document is predicted once, from its own document."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmp_train.data import iterate, train_batches
from jmp_train.data.packing import PackedRows, best_fit, pieces_of
from jmp_train.sources.tokens import ByteTokens, TokenStream, stream_of, token_dtype

TOKENS = ByteTokens()


def numbered(sizes, ended=True):
    """Documents whose tokens are all different: 1, 2, 3 and so on; 0 ends each."""
    documents, first = [], 1
    for size in sizes:
        documents.append(list(range(first, first + size)))
        first += size
    ids = [0]
    bounds = [0]
    for document in documents:
        ids += [*document, 0]
        bounds.append(len(ids) - 1)
    if not ended:
        ids.pop()
        bounds[-1] -= 1
    stream = TokenStream(np.array(ids, np.int32), np.array(bounds))
    return documents, stream


def rows_of(stream, length, ids=1000):
    sizes = np.ones(ids, np.int32)
    sizes[0] = 0
    return PackedRows(stream, length, 0, sizes)


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 25), min_size=1, max_size=20),
    length=st.integers(2, 12),
    ended=st.booleans(),
)
def test_every_token_is_predicted_once_from_what_precedes_it_in_its_document(sizes, length, ended):
    documents, stream = numbered(sizes, ended)
    batch = rows_of(stream, length).all()
    tokens, segments, mask = (batch[n] for n in ("tokens", "segments", "mask"))
    seen = []
    for row, ids, counts in zip(tokens, segments, mask, strict=True):
        for number in set(ids[counts].tolist()):
            places = np.flatnonzero((ids == number) & counts)
            np.testing.assert_array_equal(np.diff(places), 1)  # one run
            begin = places[0]
            text = row[begin : places[-1] + 2].tolist()
            # A piece of one document: its tokens in order, after an end or the token before it.
            whole = next([0, *d, 0] for d in documents if {*text} - {0} <= {*d} and {*text} - {0})
            assert any(whole[i : i + len(text)] == text for i in range(len(whole)))
            seen += text[1:]
            # Nothing of another document is in the segment.
            assert set(row[:-1][ids == number].tolist()) <= {*text, *whole}
    # Ends are predicted as often as there are whole documents, every other token once.
    assert sorted(seen) == [0] * (len(documents) - (not ended)) + list(range(1, sum(sizes) + 1))
    np.testing.assert_array_equal(batch["target_bytes"], mask & (tokens[:, 1:] != 0))
    assert (segments[mask] > 0).all() and tokens.shape[1] == length + 1


def test_short_documents_share_a_row_and_a_long_one_fills_rows():
    _, stream = numbered([3, 3, 2, 19])
    batch = rows_of(stream, 8).all()
    assert sorted(batch["mask"].sum(1).tolist()) == [7, 8, 8, 8]
    assert sorted(map(tuple, batch["segments"].tolist())) == [
        (1, 1, 1, 1, 1, 1, 1, 1),
        (1, 1, 1, 1, 1, 1, 1, 1),
        (1, 1, 1, 1, 2, 2, 2, 0),
        (1, 1, 1, 1, 2, 2, 2, 2),
    ]


def test_rows_are_as_few_as_the_predictions_allow_for_many_short_documents():
    sizes = np.random.default_rng(0).geometric(0.05, 2000)
    stream = numbered(sizes.tolist())[1]
    rows = rows_of(stream, 128, ids=len(stream.ids))
    fewest = (sizes.sum() + len(sizes)) / 128
    assert fewest <= len(rows) < 1.01 * fewest + 1


def test_a_piece_goes_to_the_fullest_row_with_room():
    """Against a search through all rows."""
    rng = np.random.default_rng(1)
    for _ in range(30):
        pieces = pieces_of(np.cumsum([0, *rng.integers(1, 20, 40)]), 16)
        joins, closes = rng.random(len(pieces.sizes)) < 0.8, rng.random(len(pieces.sizes)) < 0.1
        left, count = [], len(pieces.sizes)
        for piece in sorted(range(count), key=lambda p: -pieces.sizes[p]):
            need = pieces.sizes[piece] + (not joins[piece])
            fitting = [room for room in left if room >= need]
            if fitting:
                left.remove(min(fitting))
                left.append(0 if closes[piece] else min(fitting) - need)
            else:
                left.append(0 if closes[piece] else 16 - pieces.sizes[piece])
        rows = best_fit(pieces, 16, joins, closes)
        assert len(rows) == len(left)
        assert sorted(p for row in rows for p in row) == list(range(count))
        for row in rows:
            places = pieces.sizes[row].sum() + sum(not joins[p] for p in row[1:])
            assert places <= 16 and not closes[row[:-1]].any()


def test_a_restored_iterator_continues_with_the_same_rows():
    rng = np.random.default_rng(0)
    texts = [bytes(rng.integers(97, 123, n, np.uint8)) for n in rng.integers(1, 40, 50)]
    source = PackedRows(stream_of(texts, TOKENS), 16, TOKENS.end, TOKENS.sizes)
    make = lambda: iterate(train_batches(source, 4, seed=1))
    first, second = make(), make()
    for _ in range(9):
        next(first)
    second.set_state(first.get_state())
    for _ in range(5):
        a, b = next(first), next(second)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert a["tokens"].dtype == np.uint8


@pytest.mark.parametrize("count,dtype", [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")])  # fmt: skip
def test_ids_are_stored_in_the_narrowest_dtype(count, dtype):
    assert token_dtype(count) == dtype
    assert count - 1 <= np.iinfo(dtype).max
