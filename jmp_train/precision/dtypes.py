"""Names of floating-point dtypes and the dtypes they stand for."""

from __future__ import annotations

import difflib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ALIASES = {
    "bf16": "bfloat16",
    "f16": "float16",
    "fp16": "float16",
    "f32": "float32",
    "fp32": "float32",
    "f64": "float64",
    "fp64": "float64",
    "full": "float32",
}
_NAMES = ("bfloat16", "float16", "float32", "float64")


def half_dtype() -> np.dtype:
    """The 16-bit floating dtype of the default backend: bfloat16, but float16 on a GPU (as jmp)."""
    return np.dtype(jnp.float16 if jax.default_backend() == "gpu" else jnp.bfloat16)


def parse_dtype(name: Any, *, context: str = "") -> np.dtype:
    """The floating dtype that a name or dtype-like stands for.

    Raises:
      ValueError: if the name stands for no known floating dtype; names the nearest valid one.

    >>> parse_dtype("bf16")
    dtype(bfloat16)
    """
    if not isinstance(name, str):
        dtype = np.dtype(name)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"expected a floating dtype, got {dtype.name!r}")
        return dtype
    key = name.strip().lower()
    if key == "half":
        return half_dtype()
    key = _ALIASES.get(key, key)
    if key in _NAMES:
        return np.dtype(getattr(jnp, key))
    where = f" in policy {context!r}" if context else ""
    valid = (*_NAMES, *_ALIASES, "half")
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "expected one of " + ", ".join(sorted(valid))
    raise ValueError(f"unknown dtype {name!r}{where}; {hint}")
