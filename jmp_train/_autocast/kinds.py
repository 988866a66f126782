"""Kinds of floating values in a program: their dtypes, and where they come from."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray

from jmp_train._jaxpr.compat import AbstractValue, Operand
from jmp_train.numerics.dtypes import is_floating, parse_dtype

FLOAT32 = np.dtype(np.float32)
HALF = (np.dtype(np.float16), np.dtype(jnp.bfloat16))

Formats = frozenset[str]
"""Names of 16-bit dtypes."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """Known properties of a floating value.

    Attributes:
      native: the dtype that it counts as where dtypes are promoted.
      base: the narrowest dtype that represents it exactly; an array in it exists.
      formats: for a literal, the 16-bit dtypes whose range contains it. A literal adapts to the
        dtype of the other operands, as a Python number does, where its range allows. None for any
        other value.
      input_size: for an input of the program, at most moved since: its number of elements, before
        any broadcast. None for a computed value.
      features: for a product with an input of the program, the numbers of elements that its bias
        may have.
      binary: whether every element is 0 or 1, as in a mask or a one-hot.
      logs: whether it is linear in logarithms, as log-probabilities are.
    """

    native: np.dtype
    base: np.dtype
    formats: Formats | None = None
    input_size: int | None = None
    features: frozenset[int] = frozenset()
    binary: bool = False
    logs: bool = False


def written(dtype: Any) -> Kind:
    """Return the kind of a value in the dtype that the author wrote."""
    return Kind(np.dtype(dtype), np.dtype(dtype))


def kind_of_aval(aval: AbstractValue) -> Kind | None:
    """Return the kind of a floating array as written; None for any other dtype."""
    dtype = getattr(aval, "dtype", None)
    if dtype is None or not isinstance(aval, ShapedArray) or not is_floating(dtype):
        return None
    return written(dtype)


def kind_of_input(aval: AbstractValue) -> Kind | None:
    """Return the kind of an array that comes from outside: a weight, a bias, a batch."""
    kind = kind_of_aval(aval)
    return kind and dataclasses.replace(kind, input_size=math.prod(aval.shape))


def formats_of_literal(literal: Operand) -> Formats | None:
    """Return the 16-bit dtypes whose range contains a number; None for any other literal."""
    if np.shape(literal.val) or not jnp.issubdtype(literal.aval.dtype, np.number):
        return None
    if jnp.issubdtype(literal.aval.dtype, np.complexfloating):
        return None
    value = abs(float(np.asarray(literal.val).astype(np.float64)))
    exact = value == 0 or not np.isfinite(value)
    limits = ((d, float(jnp.finfo(d).tiny), float(jnp.finfo(d).max)) for d in HALF)
    return frozenset(d.name for d, least, most in limits if exact or least <= value <= most)


def kind_of_literal(literal: Operand) -> Kind | None:
    kind, formats = kind_of_aval(literal.aval), formats_of_literal(literal)
    binary = formats is not None and float(literal.val) in (0.0, 1.0)
    return kind and dataclasses.replace(kind, formats=formats, binary=binary)


def promote(dtypes: Iterable[np.dtype]) -> np.dtype | None:
    """Return the narrowest dtype that represents all; None where JAX has none (8-bit formats)."""
    try:
        return functools.reduce(lambda a, b: np.dtype(jnp.promote_types(a, b)), dtypes)
    except (TypeError, ValueError):
        return None


def native_dtype(kind: Kind | None) -> np.dtype | None:
    return kind and kind.native


def widest(kinds: Sequence[Kind]) -> np.dtype | None:
    """Return what operands promote to; a literal counts only where its range exceeds the format."""
    strong = [k.native for k in kinds if k.formats is None]
    dtype = promote(strong or [k.native for k in kinds]) if kinds else None
    if dtype is not None and dtype in HALF:
        too_small = [k for k in kinds if k.formats is not None and dtype.name not in k.formats]
        return promote([dtype, *[k.native for k in too_small]])
    return dtype


def computed_dtype(kinds: Sequence[Kind]) -> np.dtype | None:
    """Return the half dtype that computed operands promote to, None where there is none.

    In a model under a policy a weight that multiplies activations follows them, so inputs of the
    program do not count.
    """
    kinds = [k for k in kinds if k.input_size is None]
    dtype = widest(kinds) if any(k.formats is None for k in kinds) else None
    return dtype if dtype in HALF else None


def joined(kinds: Sequence[Kind | None]) -> Kind | None:
    """Return the kind of a result that several branches may give."""
    known = [k for k in kinds if k]
    if not known:
        return None
    native = promote([k.native for k in known]) or known[0].native
    base = promote([k.base for k in known]) or known[0].base
    return Kind(native, base)


def parse_compute_dtype(name: Any) -> np.dtype:
    """Return the dtype of a name that `autocast` can compute in; raise ValueError for another."""
    dtype = parse_dtype(name)
    if dtype not in (FLOAT32, *HALF):
        raise ValueError(f"autocast to {dtype.name}; expected bfloat16, float16 or float32")
    return dtype
