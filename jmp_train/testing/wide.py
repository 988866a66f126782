"""Programs evaluated in float64: every floating dtype in their equations is rewritten.

A program is traced in the dtypes that it was written in, and evaluated with float64 in place of
each: casts to a narrower dtype change nothing, products and sums accumulate in float64. Random
numbers therefore stay those of the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jmp_train._autocast.traced import TracedFunction
from jmp_train._jaxpr import compat
from jmp_train._jaxpr.compat import Equation, Operand
from jmp_train._jaxpr.interpret import Interpreter
from jmp_train._jaxpr.scatters import SCATTERS, applies_function, scatter
from jmp_train.types import PyTree

_DTYPE_PARAMETERS = ("dtype", "new_dtype", "preferred_element_type")

#: Operations on the bits of a format, random numbers that depend on the dtype, and code that was
#: compiled for the dtypes that it receives.
_AS_WRITTEN = frozenset(
    {
        "bitcast_convert_type",
        "ffi_call",
        "io_callback",
        "nextafter",
        "pallas_call",
        "pure_callback",
        "random_gamma",
        "rng_uniform",
        "tpu_custom_call",
        "triton_kernel_call",
    }
)


def results_in_float64(traced: TracedFunction) -> PyTree:
    """Return the results of a traced function, evaluated in float64 in a scope of its own.

    Floating results are NumPy arrays in float64, complex ones in complex128; all others are in the
    dtypes that they were written in.
    """
    body, interpreter = compat.body_of(traced.closed), _interpreter()
    arrays = [as_received(x) for x in traced.arrays]
    with jax.enable_x64(True):
        run = jax.jit(lambda *args: interpreter.run(body, args))
        return traced.rebuild([as_numpy(x) for x in run(*map(widen, arrays))])


def bind_wide(eqn: Equation, operands: Sequence[Operand]) -> list[Operand]:
    """Apply an equation in float64, to operands in float64; needs 64-bit types to be enabled."""
    name, params = eqn.primitive.name, eqn.params
    with compat.context_of(eqn):
        if name == "reduce_precision":
            return list(operands)
        if name in SCATTERS and not applies_function(eqn):
            return [scatter(eqn, *operands)]
        if name == "custom_linear_solve":
            return _solve_wide(params, operands)
        if name in _AS_WRITTEN or _has_body(params):
            narrow = [_as_traced(x, v.aval) for x, v in zip(operands, eqn.invars, strict=True)]
            return [widen(out) for out in compat.bind(eqn.primitive, narrow, params)]
        wide = {key: _wide_parameter(key, value) for key, value in params.items()}
        return compat.bind(eqn.primitive, operands, wide)


def _interpreter() -> Interpreter:
    return Interpreter(lambda eqn, operands, _: bind_wide(eqn, operands), widen, stepwise=False)


def _solve_wide(params: dict[str, Any], operands: Sequence[Operand]) -> list[Operand]:
    """Solve a linear system: the operands are constants of four functions, then right-hand sides."""
    lengths, solve = params["const_lengths"], params["jaxprs"].solve
    start = lengths.matvec + lengths.vecmat
    right = operands[sum(lengths) :]
    constants = operands[start : start + lengths.solve]
    return _interpreter().run(compat.body_of(solve), [*constants, *right])


def widen(x: Operand) -> Operand:
    """Return an array in float64 or complex128 where it is floating or complex, exactly."""
    dtype = wide_dtype(getattr(x, "dtype", None))
    if dtype is None or x.dtype == dtype:
        return x
    # NumPy converts subnormal numbers too; XLA may flush them.
    return x.astype(dtype) if isinstance(x, Tracer) else np.asarray(x).astype(dtype)


def wide_dtype(dtype: Any) -> np.dtype | None:
    """Return float64 for a floating dtype, complex128 for a complex one, None for any other."""
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        return None
    complex_ = jnp.issubdtype(dtype, jnp.complexfloating)
    return np.dtype(np.complex128 if complex_ else np.float64)


def as_received(x: Operand) -> jax.Array:
    """Return an argument in the dtype in which a jitted function receives it."""
    return jnp.asarray(x)


def as_numpy(x: Operand) -> Operand:
    """Return an array on the host; an array of PRNG keys unchanged."""
    return x if jnp.issubdtype(x.dtype, jax.dtypes.extended) else np.asarray(x)


def _as_traced(x: Operand, aval: Any) -> Operand:
    return x if wide_dtype(aval.dtype) is None else jnp.asarray(x).astype(aval.dtype)


def _has_body(params: dict[str, Any]) -> bool:
    leaves = jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
    return any(hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr") for leaf in leaves)


def _wide_parameter(name: str, value: Any) -> Any:
    if name in _DTYPE_PARAMETERS and value is not None:
        return wide_dtype(value) or value
    if name == "weak_type":
        return False
    return None if name == "precision" else value  # an algorithm names the dtypes of its operands
