"""Type aliases that signatures share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

__all__ = ["Batch", "DTypeLike", "Function", "Json", "Key", "PyTree"]

# `Any`, because Python cannot express "nested containers of arrays": a recursive union of dict, list
# and tuple would refuse dataclasses and Flax states, and every access to a leaf would be an error.
PyTree = Any
"""Nested containers, such as dicts, tuples and dataclasses, whose leaves are arrays."""

Batch = Mapping[str, np.ndarray | jax.Array]
"""Arrays by name, whose leading axis counts examples."""

Key = jax.Array
"""A PRNG key: typed, of shape (), or raw, uint32 with one axis."""

Json = dict[str, Any]
"""A JSON object: text, numbers, booleans, None, lists and objects by name."""

Function = Callable[..., Any]
"""A function of any arguments, such as a loss function or a method of a model."""
