"""Floating-point formats by name, and the format that a device computes fastest.

A *name* is a string from the user (`"bf16"`, `"float16"`, `"full"`, `"half"`). A *dtype* is always
a `numpy.dtype`, which is hashable, compares equal to `jnp.bfloat16` and so on, and is static under
jit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train.errors import nearest
from jmp_train.types import DTypeLike

# Without short names. The two fnuz formats are those of AMD CDNA 3.
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")

_SHORT_NAMES: dict[str, tuple[str, ...]] = {
    "bfloat16": ("bf16", "bfloat16"),
    "float16": ("f16", "float16", "fp16"),
    "float32": ("full", "f32", "float32", "fp32"),
    "float64": ("f64", "float64", "fp64"),
    **{name: (name,) for name in _FLOAT8},
}

_DTYPES = {
    alias: np.dtype(getattr(jnp, name)) for name, names in _SHORT_NAMES.items() for alias in names
}

#: All names of each dtype; the first is the one that `str(policy)` prints. As in jmp, a key may be
#: `jnp.float16`, `numpy.float16` or `numpy.dtype("float16")`.
dtype_to_names: dict[Any, tuple[str, ...]] = {
    key: names
    for name, names in _SHORT_NAMES.items()
    for key in (getattr(jnp, name), np.dtype(getattr(jnp, name)), np.dtype(getattr(jnp, name)).type)
}

#: Every name that `parse_dtype` accepts.
DTYPE_NAMES: tuple[str, ...] = (*_DTYPES, "half")


def half_dtype() -> np.dtype:
    """Return the dtype named `"half"`, as in jmp: bfloat16 on a TPU, float16 on other devices.

    float16 overflows above 65,504 and needs a loss scale. GPUs since Ampere run bfloat16 as fast.
    `fastest_dtype` and the policy `"auto"` choose by device.
    """
    return np.dtype(jnp.bfloat16 if jax.default_backend() == "tpu" else jnp.float16)


def fastest_dtype(device: Any = None) -> np.dtype:
    """Return the dtype in which a device multiplies matrices fastest without emulation.

    | device | dtype |
    | --- | --- |
    | TPU | bfloat16 |
    | NVIDIA GPU, compute capability 8.0 (Ampere) and later | bfloat16 |
    | NVIDIA GPU, compute capability 7.x (Volta, Turing) | float16 |
    | AMD GPU, gfx908 (CDNA) and later | bfloat16 |
    | CPU, older GPU | float32, because XLA converts 16-bit operands to float32 |

    Args:
      device: a `jax.Device`; the first default device when None.

    >>> fastest_dtype(jax.devices("cpu")[0])
    dtype('float32')
    """
    device = jax.devices()[0] if device is None else device
    if device.platform == "tpu":
        return np.dtype(jnp.bfloat16)
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform in ("gpu", "cuda", "rocm"):
        if capability.startswith("gfx"):
            cdna = capability.split(":")[0] in ("gfx908", "gfx90a", "gfx940", "gfx942", "gfx950")
            return np.dtype(jnp.bfloat16 if cdna else jnp.float16)
        major = float(capability or 0)
        if major >= 8.0:
            return np.dtype(jnp.bfloat16)
        if major >= 7.0:
            return np.dtype(jnp.float16)
    return np.dtype(jnp.float32)


def is_floating(dtype: DTypeLike) -> bool:
    """Return whether a dtype is real floating; PRNG key dtypes, integers and booleans are not."""
    return jnp.issubdtype(dtype, jnp.floating)


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """Return float32 for a narrower floating dtype, and any other dtype unchanged.

    JAX has no implicit promotion for 8-bit floats, so `jnp.promote_types` does not work here.

    >>> at_least_float32(jnp.float8_e5m2), at_least_float32(jnp.complex64)
    (dtype('float32'), dtype('complex64'))
    """
    return np.dtype(np.float32) if jnp.finfo(dtype).bits < 32 else np.dtype(dtype)


def parse_dtype(name: Any, *, policy: str | None = None) -> np.dtype:
    """Parse a name, a scalar type or a dtype as a floating dtype.

    Args:
      name: one of `DTYPE_NAMES`, or a value that `numpy.dtype` accepts for one of these dtypes.
      policy: policy string that contains the name, for the error message.

    Raises:
      ValueError: for an unknown name, with the nearest known one, and for any value that is not one
        of these dtypes, including None (float64 in NumPy).

    >>> parse_dtype("bf16"), parse_dtype(jnp.float16)
    (dtype(bfloat16), dtype('float16'))
    """
    if isinstance(name, str):
        if name == "half":
            return half_dtype()
        if name in _DTYPES:
            return _DTYPES[name]
        where = "" if policy is None else f" in policy {policy!r}"
        raise ValueError(f"Unknown dtype {name!r}{where}; {nearest(name, DTYPE_NAMES)}")
    try:
        dtype = np.dtype(name)
    except TypeError:
        dtype = None
    if name is None or dtype is None or dtype not in dtype_to_names:
        raise ValueError(f"expected a floating dtype such as bfloat16 or float32, got {name!r}")
    return dtype


def dtype_name(dtype: DTypeLike) -> str:
    """Return the short name of a dtype, which `parse_dtype` accepts.

    >>> dtype_name(jnp.float32), dtype_name(jnp.bfloat16)
    ('full', 'bf16')
    """
    dtype = np.dtype(dtype)
    return dtype_to_names.get(dtype, (dtype.name,))[0]
