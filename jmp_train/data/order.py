"""The order of examples that are read at random: a pure function of the seed and the position."""

from __future__ import annotations

import itertools
from typing import Any

import grain
import numpy as np

from jmp_train.sources.random import generator

_SHUFFLE = 0  # purpose of a stream of random numbers, beside that of data.batches
_LARGEST_PERMUTATION = 2**24  # examples; 128 MiB for an epoch
_LARGEST_SHUFFLE = 2**32 - 1  # examples, of Grain's index shuffle


class Order:
    """The order of the examples: every example once per epoch, reshuffled each epoch.

    Up to 2**24 examples have the permutation that NumPy draws for an epoch. More have Grain's shuffle
    of an index (a block cipher over the indices), which needs no memory.

    >>> order = Order(size=6, batch_size=3, seed=0)
    >>> order.rows(0, batches=2).shape, sorted(order.rows(0, batches=2).ravel().tolist())
    ((2, 3), [0, 1, 2, 3, 4, 5])
    """

    def __init__(self, size: int, batch_size: int, *, seed: int):
        self._size = size
        self._batch_size = batch_size
        self._seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    def rows(self, first: int, batches: int) -> np.ndarray:
        """Return the indices of the examples of some batches; shape=(batches, batch), int.

        They are a pure function of the seed, and of the index of each batch.

        Args:
          first: index of the first batch.
          batches: number of batches.
        """
        position = np.arange(first * self._batch_size, (first + batches) * self._batch_size)
        epoch, start = divmod(first * self._batch_size, self._size)
        if start + len(position) <= self._size:  # all of one epoch
            found = self._shuffled(epoch, position - epoch * self._size)
            return found.reshape(batches, self._batch_size)
        epochs, within = np.divmod(position, self._size)
        cuts = [0, *(np.flatnonzero(np.diff(epochs)) + 1), len(position)]
        parts = [
            self._shuffled(int(epochs[start]), within[start:end])
            for start, end in itertools.pairwise(cuts)
        ]
        return np.concatenate(parts).reshape(batches, self._batch_size)

    def _shuffled(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the indices of the examples at positions of an epoch."""
        if _LARGEST_PERMUTATION < self._size <= _LARGEST_SHUFFLE:
            key = int(generator(self._seed, epoch, _SHUFFLE).integers(2**32))
            shuffle = grain.experimental.index_shuffle
            # Four rounds, as in Grain's own shuffle of a data set.
            found = [shuffle(int(p), self._size - 1, key, 4) for p in positions]
            return np.asarray(found, np.int64)
        epochs = self._epochs  # replaced, never mutated, because Grain reads from several threads
        if epoch not in epochs:
            rng = generator(self._seed, epoch, _SHUFFLE)
            recent = {e: order for e, order in epochs.items() if abs(e - epoch) <= 1}
            epochs = self._epochs = {**recent, epoch: rng.permutation(self._size)}
        return epochs[epoch][positions]


class BlockOrder(Order):
    """An order for a source that is read in blocks, such as the row groups of Parquet files.

    Each epoch shuffles the blocks, and then the examples of each few blocks together, so that these
    alone are held.

    Args:
      starts: index of the first example of each block, and the number of examples.
      batch_size: number of examples in a batch.
      together: number of blocks whose examples are shuffled together.
      seed: seed of the order.

    >>> order = BlockOrder(np.array([0, 4, 8, 12]), batch_size=4, together=1, seed=0)
    >>> [sorted(batch.tolist()) for batch in order.rows(0, batches=3)]
    [[8, 9, 10, 11], [0, 1, 2, 3], [4, 5, 6, 7]]
    """

    def __init__(self, starts: np.ndarray, batch_size: int, *, together: int, seed: int):
        super().__init__(int(starts[-1]), batch_size, seed=seed)
        self._starts, self._together = np.asarray(starts), together
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def _shuffled(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        blocks = generator(self._seed, epoch, _SHUFFLE).permutation(len(self._starts) - 1)
        sizes = np.diff(self._starts)[blocks]
        whole = np.add.reduceat(sizes, np.arange(0, len(sizes), self._together))
        begins = np.concatenate([[0], np.cumsum(whole)])
        windows = np.searchsorted(begins, positions, side="right") - 1
        found = np.empty(len(positions), np.int64)
        for window in np.unique(windows):
            at = windows == window
            first = int(window) * self._together
            order = self._window(epoch, int(window), blocks[first : first + self._together])
            found[at] = order[positions[at] - begins[window]]
        return found

    def _window(self, epoch: int, window: int, blocks: np.ndarray) -> np.ndarray:
        """Return the examples of some blocks, shuffled."""
        kept = self._windows  # replaced, never mutated, as in `Order`
        if (epoch, window) not in kept:
            rows = np.concatenate(
                [np.arange(*self._starts[b : b + 2].tolist()) for b in blocks.tolist()]
            )
            generator(self._seed, epoch, _SHUFFLE, window + 1).shuffle(rows)
            last = dict(itertools.islice(reversed(kept.items()), 1))
            kept = self._windows = {**last, (epoch, window): rows}
        return kept[epoch, window]


def order_of(source: Any, batch_size: int, *, seed: int) -> Order:
    """Return the order in which a source is read.

    Args:
      source: the examples; if it has `blocks`, a pair of the indices at which blocks begin (with the
        number of examples) and the number of blocks to shuffle together, it is read in blocks.
      batch_size: number of examples in a batch.
      seed: seed of the order.
    """
    blocks = getattr(source, "blocks", None)
    if blocks is None:
        return Order(len(source), batch_size, seed=seed)
    starts, together = blocks
    return BlockOrder(starts, batch_size, together=together, seed=seed)
