"""Arrays compared by their bit patterns, in which -0 differs from 0 and a NaN equals itself."""

from typing import Any

import numpy as np

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def unsigned(dtype: Any) -> type[np.unsignedinteger]:
    """Return the unsigned integer type as wide as a dtype."""
    return _UNSIGNED[np.dtype(dtype).itemsize]


def bits(x: Any) -> np.ndarray:
    """Return the bit patterns of an array as unsigned integers."""
    x = np.asarray(x)
    return x.view(unsigned(x.dtype))


def every_pattern(dtype: Any) -> np.ndarray:
    """Return all bit patterns of a dtype of 8 or 16 bits, as unsigned integers."""
    return np.arange(2 ** (8 * np.dtype(dtype).itemsize)).astype(unsigned(dtype))
