"""Precision policies: dtypes of parameters, compute and outputs.

A `Policy` is three dtypes and nothing else: hashable, static under jit, and printed as a string that
`get_policy` parses back. Its casts change floating arrays only. `get_policy` reads the grammar of
google-deepmind/jmp and the policy names of Keras and Lightning.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import numpy as np

from jmp_train.errors import nearest
from jmp_train.numerics.dtypes import DTYPE_NAMES, dtype_name, fastest_dtype, parse_dtype
from jmp_train.tree import cast_floating
from jmp_train.types import DTypeLike

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Dtypes of parameters, compute and outputs.

    Attributes:
      param_dtype: dtype that parameters are stored in.
      compute_dtype: dtype of the forward and the backward pass.
      output_dtype: dtype that a model's outputs are cast to before the loss.

    Each argument is a name (`"bf16"`), a scalar type (`jnp.bfloat16`) or a dtype; each attribute is
    a `numpy.dtype`.

    Raises:
      ValueError: for an unknown or non-floating dtype.

    >>> policy = Policy("float32", "bfloat16", "float32")
    >>> print(policy)
    p=full,c=bf16,o=full
    >>> get_policy(str(policy)) == policy == get_policy("mixed_bfloat16")
    True
    """

    param_dtype: Any
    compute_dtype: Any
    output_dtype: Any

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, parse_dtype(getattr(self, field.name)))

    def cast_to_param(self, tree: T) -> T:
        """Cast floating leaves to the parameter dtype; see `cast_floating`."""
        return cast_floating(tree, self.param_dtype)

    def cast_to_compute(self, tree: T) -> T:
        """Cast floating leaves to the compute dtype; see `cast_floating`."""
        return cast_floating(tree, self.compute_dtype)

    def cast_to_output(self, tree: T) -> T:
        """Cast floating leaves to the output dtype; see `cast_floating`."""
        return cast_floating(tree, self.output_dtype)

    def with_output_dtype(self, output_dtype: DTypeLike) -> Policy:
        """Return the same policy with another output dtype."""
        return dataclasses.replace(self, output_dtype=output_dtype)

    def __str__(self) -> str:
        return (
            f"p={dtype_name(self.param_dtype)},c={dtype_name(self.compute_dtype)},"
            f"o={dtype_name(self.output_dtype)}"
        )


_PRESETS = {
    "mixed_bfloat16": "p=f32,c=bf16,o=f32",
    "mixed_float16": "p=f32,c=f16,o=f32",
    "bf16-mixed": "p=f32,c=bf16,o=f32",
    "16-mixed": "p=f32,c=f16,o=f32",
    "bf16-true": "bf16",
    "16-true": "f16",
    "32-true": "f32",
    "64-true": "f64",
}
_KEYS = {
    "p": "param_dtype",
    "params": "param_dtype",
    "c": "compute_dtype",
    "compute": "compute_dtype",
    "o": "output_dtype",
    "output": "output_dtype",
}
POLICY_NAMES: tuple[str, ...] = ("auto", *_PRESETS, *DTYPE_NAMES)


def get_policy(policy: str | Policy) -> Policy:
    """Parse a policy string.

    | string | parameters | compute | output |
    | --- | --- | --- | --- |
    | `"bf16"`, any one dtype | bf16 | bf16 | bf16 |
    | `"c=f16"` | f32 | f16 | f16 |
    | `"p=bf16"` | bf16 | bf16 | bf16 |
    | `"params=float32,compute=bfloat16,output=float32"` | f32 | bf16 | f32 |
    | `"mixed_bfloat16"`, `"bf16-mixed"` | f32 | bf16 | f32 |
    | `"mixed_float16"`, `"16-mixed"` | f32 | f16 | f32 |
    | `"bf16-true"`, `"16-true"`, `"32-true"`, `"64-true"` | all in that dtype | | |
    | `"auto"` | f32 | `fastest_dtype()` | f32 |

    In the `key=value` form, the parameter dtype defaults to float32, the compute dtype to the
    parameter dtype, and the output dtype to the compute dtype (the grammar of google-deepmind/jmp).
    A dtype is one of `bf16`, `bfloat16`, `f16`, `float16`, `f32`, `float32`, `full`, `f64`,
    `float64`, `half`.

    Args:
      policy: the string; a `Policy` is returned unchanged.

    Raises:
      ValueError: for an unknown name, key or dtype, with the nearest valid one.
      TypeError: if `policy` is neither a string nor a `Policy`.

    >>> print(get_policy("c=bf16"))
    p=full,c=bf16,o=bf16
    >>> get_policy("c=float17")
    Traceback (most recent call last):
    ValueError: Unknown dtype 'float17' in policy 'c=float17'; did you mean 'float16'?
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"expected a policy string such as 'mixed_bfloat16', got {policy!r}")
    text = policy.strip()
    if text == "auto":
        return Policy(np.float32, fastest_dtype(), np.float32)
    text = _PRESETS.get(text, text)
    if "=" not in text:
        if text not in DTYPE_NAMES:
            raise ValueError(f"Unknown dtype or policy {text!r}; {nearest(text, POLICY_NAMES)}")
        dtype = parse_dtype(text)
        return Policy(dtype, dtype, dtype)
    given: dict[str, np.dtype] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in _KEYS:
            raise ValueError(f"Unknown key {key!r} in policy {policy!r}; {nearest(key, _KEYS)}")
        if not equals:
            raise ValueError(f"Key {key!r} in policy {policy!r} has no dtype; write {key}=bf16")
        if _KEYS[key] in given:
            raise ValueError(f"Key {key!r} is given twice in policy {policy!r}; expected once")
        given[_KEYS[key]] = parse_dtype(value, policy=policy)
    param = given.get("param_dtype", np.dtype(np.float32))
    compute = given.get("compute_dtype", param)
    return Policy(param, compute, given.get("output_dtype", compute))
