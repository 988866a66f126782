"""A precision policy: which dtype parameters are stored in, computed in, and returned in."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train.precision.dtypes import half_dtype, parse_dtype

T = TypeVar("T")


def _cast_leaf(x: Any, dtype: np.dtype) -> Any:
    # Only arrays are cast; strings, None, Python scalars and opaque objects are left alone.
    # A PRNG key array's dtype is an extended dtype, which is not a floating one.
    if not isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return x
    if x.dtype == dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x.astype(dtype)


def cast_floating(tree: T, dtype: Any) -> T:
    """Casts the floating array leaves of a pytree; every other leaf is returned as it is."""
    dtype = np.dtype(dtype)
    return jax.tree_util.tree_map(lambda x: _cast_leaf(x, dtype), tree)


def cast_to_full(tree: T) -> T:
    """Casts floating leaves to float32."""
    return cast_floating(tree, jnp.float32)


def cast_to_half(tree: T) -> T:
    """Casts floating leaves to `half_dtype()`."""
    return cast_floating(tree, half_dtype())


@dataclasses.dataclass(frozen=True)
class Policy:
    """Dtypes for parameters, compute and outputs; hashable, so static under jit.

    >>> str(get_policy("mixed_bfloat16"))
    'params=float32,compute=bfloat16,output=float32'
    """

    param_dtype: Any
    compute_dtype: Any
    output_dtype: Any

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, parse_dtype(getattr(self, field.name)))

    def cast_to_param(self, x: T) -> T:
        """Casts floating leaves to the parameter dtype."""
        return cast_floating(x, self.param_dtype)

    def cast_to_compute(self, x: T) -> T:
        """Casts floating leaves to the compute dtype."""
        return cast_floating(x, self.compute_dtype)

    def cast_to_output(self, x: T) -> T:
        """Casts floating leaves to the output dtype."""
        return cast_floating(x, self.output_dtype)

    def with_output_dtype(self, output_dtype: Any) -> Policy:
        """The same policy with another output dtype."""
        return dataclasses.replace(self, output_dtype=output_dtype)

    def __str__(self) -> str:
        return (
            f"params={self.param_dtype.name},compute={self.compute_dtype.name},"
            f"output={self.output_dtype.name}"
        )


_PRESETS = {
    "mixed_bfloat16": ("float32", "bfloat16", "float32"),
    "mixed_float16": ("float32", "float16", "float32"),
    "bf16-mixed": ("float32", "bfloat16", "float32"),
    "16-mixed": ("float32", "float16", "float32"),
}
_KEYS = {"p": 0, "param": 0, "params": 0, "c": 1, "compute": 1, "o": 2, "output": 2}
_KEYS |= {"param_dtype": 0, "compute_dtype": 1, "output_dtype": 2}


def get_policy(name: str | Policy) -> Policy:
    """Parses a policy in jmp's grammar or by preset name.

    `"bf16"` puts all three in bfloat16; `"c=f16"` sets compute and output alone, as in jmp the
    output follows compute where it is not named; parameters default to float32.

    Raises:
      ValueError: on an unknown name, key or dtype; names the nearest valid one.
    """
    if isinstance(name, Policy):
        return name
    key = name.strip()
    if key in _PRESETS:
        return Policy(*_PRESETS[key])
    if "=" not in key:
        try:
            dtype = parse_dtype(key)
        except ValueError:
            valid = (*_PRESETS, "bfloat16", "float16", "float32", "half", "full")
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of {valid}"
            raise ValueError(f"unknown policy {name!r}{hint}") from None
        return Policy(dtype, dtype, dtype)
    found: list[Any] = [None, None, None]
    for part in key.split(","):
        field, _, value = (s.strip() for s in part.partition("="))
        if field not in _KEYS:
            near = difflib.get_close_matches(field, _KEYS, n=1, cutoff=0.0)
            raise ValueError(f"unknown key {field!r} in policy {name!r}; did you mean {near[0]!r}?")
        if found[_KEYS[field]] is not None:
            raise ValueError(f"{field!r} is given twice in policy {name!r}")
        found[_KEYS[field]] = parse_dtype(value, context=name)
    param, compute, output = found
    param = param if param is not None else np.dtype(jnp.float32)
    compute = compute if compute is not None else param
    return Policy(param, compute, output if output is not None else compute)
