"""Random numbers that are a pure function of a seed and a position."""

from __future__ import annotations

import numpy as np


def generator(seed: int, count: int, purpose: int, *more: int) -> np.random.Generator:
    """Return the random numbers of a purpose: a pure function of all arguments."""
    words = [seed, count, purpose, *more]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
