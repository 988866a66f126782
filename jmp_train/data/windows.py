"""Windows of a text: random ones to train on, and those that predict held-out tokens once."""

from __future__ import annotations

import numpy as np

from jmp_train.types import Batch


class Windows:
    """A source of windows of a text: one from each of equal parts, with a random start in the part.

    There are as many parts as disjoint windows.
    """

    in_memory = True

    def __init__(self, text: np.ndarray, length: int):
        self._windows = np.lib.stride_tricks.sliding_window_view(text, length + 1)
        self._parts = max(len(self._windows) // length, 1)

    def __len__(self) -> int:
        return self._parts

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        size = len(self._windows) / self._parts
        start = ((rows + rng.random(rows.shape)) * size).astype(np.int64)
        return {"tokens": self._windows[np.minimum(start, len(self._windows) - 1)]}


def held_out_windows(data: np.ndarray, split: int, length: int) -> dict[str, np.ndarray]:
    """Return windows that predict every byte from `split`, and a mask of the scored predictions."""
    stride = length // 2
    ends = np.minimum(np.arange(split + stride, len(data) + stride, stride), len(data))
    starts = ends - length - 1
    predicted = starts[:, None] + 1 + np.arange(length)  # index of each predicted byte
    fresh = np.concatenate([[split], ends[:-1]])  # end of the previous window
    windows = np.lib.stride_tricks.sliding_window_view(data, length + 1)
    return {"tokens": windows[starts], "mask": predicted >= fresh[:, None]}
