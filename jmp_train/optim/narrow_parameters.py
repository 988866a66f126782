"""What the transformations for parameters narrower than float32 share.

The transformations decide on a parameter's new value to the bit. An update that is added, as
Optax's are, cannot carry that: where a parameter falls from 1 to 2^-30, no float32 u makes
`1 + u` round to it, because float32 spaces its values near -1 by 2^-24. `BitUpdate` carries the
difference of bit patterns instead, and knows how to be added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmp_train.numerics.dtypes import is_floating
from jmp_train.numerics.rounding import NARROW_FORMATS, to_float32


class NarrowParameters(optax.GradientTransformationExtraArgs):
    """A transformation that takes parameters narrower than float32 as they are.

    `fp32_state`, and `make_step` with it, hands such a one the parameters themselves.
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BitUpdate:
    """An update whose sum with its parameter is the new parameter, bit for bit.

    `old + BitUpdate(bits(new) - bits(old))` is `new` for every pair of bit patterns, signed zeros,
    subnormals, infinities and NaN among them, because integers modulo 2^16 are a group; zeros
    leave a parameter as it is. `optax.apply_updates` needs nothing else. It is a pytree with one
    leaf and may leave jit and pass through `lax.scan`, `lax.cond` and `jnp.where`. It is not a
    number: a transformation that scales or averages updates belongs inside the one that made this,
    and adding the result of one outside raises.

    Attributes:
      difference: of the bit patterns, modulo 2^16 or 2^8; uint16 or uint8, of the parameter's
        shape.

    >>> update = BitUpdate.between(jnp.bfloat16(1.0), jnp.bfloat16(2.0**-30))
    >>> jnp.bfloat16(1.0) + update
    Array(9.31323e-10, dtype=bfloat16)
    """

    difference: Any

    __array_ufunc__ = None  # so that a NumPy array leaves the addition to __radd__

    @classmethod
    def between(cls, old: Any, new: Any) -> BitUpdate:
        """The update that makes `new` out of `old`, two arrays of one narrow dtype and shape."""
        return cls(_bits(new) - _bits(old))

    def __radd__(self, old: Any) -> jax.Array:
        dtype, unsigned = jnp.result_type(old), jnp.result_type(self.difference)
        if unsigned != _unsigned(dtype):
            raise TypeError(
                f"the update of a {dtype} parameter holds {unsigned}; expected the "
                f"{_unsigned(dtype)} that it was made with: put a transformation that changes "
                "updates inside the one for narrow parameters, as in "
                "master_weights(optax.chain(...))"
            )
        return _add_bits(old, self.difference)

    __add__ = __radd__


@jax.custom_jvp
def _add_bits(old: Any, difference: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(_bits(old) + difference, jnp.result_type(old))


@_add_bits.defjvp
def _no_derivative(primals: Any, tangents: Any) -> Any:
    # Of a bit pattern it would be zero, without a word.
    raise TypeError(
        "parameters under master_weights, bf16_remainder, kahan or stochastic_rounding cannot be "
        "differentiated through an update, which works on their bits; expected float32 parameters, "
        "as in the policy 'mixed_bfloat16'"
    )


def _unsigned(dtype: Any) -> np.dtype:
    return np.dtype(np.uint8 if jnp.finfo(dtype).bits == 8 else np.uint16)


def _bits(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return jax.lax.bitcast_convert_type(x, _unsigned(x.dtype))


def is_narrow(x: Any) -> bool:
    """Whether an array is floating and narrower than float32."""
    dtype = jnp.result_type(x)
    return is_floating(dtype) and jnp.finfo(dtype).bits < 32


def check_narrow(
    name: str, params: Any, dtypes: tuple[np.dtype, ...] = NARROW_FORMATS
) -> list[Any]:
    """The narrow leaves of parameters, after a look at the dtypes.

    Args:
      name: of the transformation, for the message.
      params: the parameters.
      dtypes: what it takes.

    Raises:
      ValueError: if there are parameters and none is narrower than float32, or one has another
        dtype.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    expected = " or ".join(dtype.name for dtype in dtypes)
    for path, leaf in leaves:
        if is_narrow(leaf) and jnp.result_type(leaf) not in dtypes:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{name}: parameter {where!r} is {jnp.result_type(leaf)}; expected {expected} "
                "(or float32, which is left to the inner optimizer)"
            )
    narrow = [leaf for _, leaf in leaves if is_narrow(leaf)]
    if leaves and not narrow:  # `optax.tree.map_params` calls `init` with a tree without leaves
        found = ", ".join(sorted({str(jnp.result_type(leaf)) for _, leaf in leaves}))
        raise ValueError(
            f"{name}: the parameters are {found}; expected some in {expected}. If they are in your "
            f"program, {name} must be the outermost transformation that sees them: "
            f"{name}(optax.chain(...)), not optax.chain(..., {name}(...)), in make_step"
        )
    return narrow


def map_narrow(function: Callable[..., Any], params: Any, *trees: Any) -> Any:
    """`function(param, *leaves)` for each narrow parameter; None in the place of the others.

    Args:
      function: of a parameter and what the trees hold in its place.
      params: the parameters.
      *trees: of the parameters' structure; a whole subtree or None may stand for a leaf.
    """
    leaves, treedef = _flatten(params)
    columns = [treedef.flatten_up_to(tree) for tree in trees]
    rows = zip(leaves, *columns, strict=True)
    return treedef.unflatten([function(*row) if is_narrow(row[0]) else None for row in rows])


def in_full(params: Any, full: Any = None) -> Any:
    """The parameters with float32 in the place of the narrow ones.

    Args:
      params: the parameters.
      full: those float32 values, from `map_narrow`; the parameters' own when None.
    """
    full = map_narrow(to_float32, params) if full is None else full
    return _merge(params, full, params)


def bit_updates(updates: Any, params: Any, new: Any) -> Any:
    """The updates with a `BitUpdate` in the place of each narrow parameter's.

    Args:
      updates: of the inner optimizer.
      params: the parameters before.
      new: the narrow ones after, from `map_narrow`.
    """
    return _merge(params, map_narrow(BitUpdate.between, params, new), updates)


def apply_updates(params: Any, updates: Any) -> Any:
    """`optax.apply_updates` for parameters of any dtype.

    JAX promotes no 8-bit float, so Optax cannot add a float32 update to one; here the sum is
    formed in float32, as for a 16-bit parameter, and rounded once.
    """

    def add(p: Any, u: Any) -> Any:
        if jnp.finfo(p.dtype).bits > 8 or isinstance(u, BitUpdate):
            p = jnp.asarray(p)
            return (p + u).astype(p.dtype)
        return (p.astype(jnp.float32) + u).astype(p.dtype)

    return jax.tree.map(add, params, updates)


def _flatten(params: Any) -> tuple[list[Any], Any]:
    if params is None:
        raise ValueError("the parameters are missing; expected update(updates, state, params)")
    return jax.tree.flatten(params)


def _merge(params: Any, narrow: Any, others: Any) -> Any:
    leaves, treedef = _flatten(params)
    rows = zip(leaves, treedef.flatten_up_to(narrow), treedef.flatten_up_to(others), strict=True)
    return treedef.unflatten([n if is_narrow(p) else other for p, n, other in rows])
