"""The order of examples: permutations, in blocks and without memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmp_train.data import order as module
from jmp_train.data.order import BlockOrder, Order, order_of


def epoch_of(order, size, epoch):
    """The rows of an epoch, read one at a time."""
    order._batch_size = 1
    return order.rows(epoch * size, batches=size).ravel()


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    together=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_blocks_are_permutations_that_hold_few_blocks(sizes, together, seed):
    starts = np.concatenate([[0], np.cumsum(sizes)])
    size = int(starts[-1])
    order = BlockOrder(starts, 1, together=together, seed=seed)
    for epoch in range(2):
        rows = epoch_of(order, size, epoch)
        np.testing.assert_array_equal(np.sort(rows), np.arange(size))
        blocks = np.searchsorted(starts, rows, side="right") - 1
        place, windows = 0, []
        while place < size:  # each window is whole blocks, none of which comes again
            window = list(dict.fromkeys(blocks[place:].tolist()))[:together]
            length = sum(sizes[b] for b in window)
            inside = set(blocks[place : place + length].tolist())
            assert len(inside) <= together and not inside & set().union(*windows)
            assert length == sum(sizes[b] for b in inside)
            windows.append(inside)
            place += length


def test_any_position_is_read_alone_and_epochs_differ():
    starts = np.array([0, 5, 9, 20])
    whole = BlockOrder(starts, 4, together=2, seed=1).rows(0, batches=10)
    for batch in (7, 0, 4):
        alone = BlockOrder(starts, 4, together=2, seed=1).rows(batch, batches=1)
        np.testing.assert_array_equal(alone[0], whole[batch])
    assert (whole[:5] != whole[5:]).any()
    other = BlockOrder(starts, 4, together=2, seed=2).rows(0, batches=10)
    assert (whole != other).any()


def test_large_data_are_shuffled_without_a_permutation(monkeypatch):
    monkeypatch.setattr(module, "_LARGEST_PERMUTATION", 10)
    first, second = (epoch_of(Order(1000, 1, seed=3), 1000, epoch) for epoch in (0, 1))
    for rows in (first, second):
        np.testing.assert_array_equal(np.sort(rows), np.arange(1000))
    assert (first != second).mean() > 0.9
    # Neighbours are far apart: the mean distance of two random numbers below n is n / 3.
    assert abs(np.abs(np.diff(first)).mean() - 1000 / 3) < 50


def test_a_position_of_a_billion_examples_needs_no_memory():
    order = Order(10**9, 4, seed=0)
    rows = order.rows(123_456, batches=2)
    assert rows.shape == (2, 4) and len(set(rows.ravel().tolist())) == 8
    assert order._epochs == {}
    np.testing.assert_array_equal(Order(10**9, 4, seed=0).rows(123_457, batches=1)[0], rows[1])


def test_a_source_with_blocks_is_read_in_blocks():
    class Blocks:
        blocks = np.array([0, 3, 6]), 1

        def __len__(self):
            return 6

    first = set(order_of(Blocks(), 3, seed=0).rows(0, batches=1).ravel().tolist())
    assert first in ({0, 1, 2}, {3, 4, 5})
    assert type(order_of([1, 2], 1, seed=0)) is Order


@pytest.mark.parametrize("size,batch", [(7, 3), (5, 5), (3, 8)])
def test_every_example_comes_once_in_an_epoch(size, batch):
    rows = Order(size, batch, seed=0).rows(0, batches=2 * size).ravel()
    for epoch in range(2 * batch):
        part = rows[epoch * size : (epoch + 1) * size]
        np.testing.assert_array_equal(np.sort(part), np.arange(size))
