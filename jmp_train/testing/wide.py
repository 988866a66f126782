"""Programs evaluated in float64: every floating dtype in their equations is rewritten.

A program is traced in the dtypes that it was written in, and evaluated with float64 in place of
each: casts to a narrower dtype change nothing, products and sums accumulate in float64. What the
samplers of `jax.random` draw stays in the dtype that they draw it in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jmp_train._autocast.traced import TracedFunction
from jmp_train._jaxpr import compat
from jmp_train._jaxpr.bodies import construct_of
from jmp_train._jaxpr.compat import Body, Equation, Operand
from jmp_train._jaxpr.interpret import TOP, Interpreter
from jmp_train._jaxpr.scatters import SCATTERS, applies_function, scatter
from jmp_train.types import PyTree

_DTYPE_PARAMETERS = ("dtype", "new_dtype", "preferred_element_type")

#: Code that was compiled for the dtypes that it receives.
_FOREIGN = frozenset(
    {
        "call_exported",
        "ffi_call",
        "io_callback",
        "pallas_call",
        "pure_callback",
        "tpu_custom_call",
        "triton_kernel_call",
    }
)

#: Operations on the bits of a format, and random numbers that depend on the dtype.
_OF_THE_FORMAT = frozenset({"bitcast_convert_type", "nextafter", "random_gamma", "rng_uniform"})


def results_in_float64(traced: TracedFunction) -> PyTree:
    """Return the results of a traced function, evaluated in float64 in a scope of its own.

    Floating results are NumPy arrays in float64, complex ones in complex128; all others are in the
    dtypes that they were written in.
    """
    body, interpreter = compat.body_of(traced.closed), _interpreter()
    arrays = [as_received(x) for x in traced.arrays]
    with jax.enable_x64(True):
        run = jax.jit(lambda *args: interpreter.run(body, args))
        return traced.rebuild([on_host(x) for x in run(*map(widen, arrays))])


def bind_wide(eqn: Equation, operands: Sequence[Operand]) -> list[Operand]:
    """Apply an equation in float64, to operands in float64; needs 64-bit types to be enabled."""
    name, params = eqn.primitive.name, eqn.params
    with compat.context_of(eqn):
        if name == "reduce_precision":
            return list(operands)
        if name in SCATTERS:
            return [scatter(eqn, *operands, function=_applied_wide(eqn))]
        if name in _REDUCTIONS:
            return _REDUCTIONS[name](eqn, operands)
        if _is_shard_map(eqn):
            return _interpreter().shard_map(eqn, list(operands), TOP)
        if name in _OF_THE_FORMAT or is_foreign(eqn):
            narrow = [_as_traced(x, v.aval) for x, v in zip(operands, eqn.invars, strict=True)]
            return [widen(out) for out in compat.bind(eqn.primitive, narrow, params)]
        wide = {key: _wide_parameter(key, value) for key, value in params.items()}
        return compat.bind(eqn.primitive, operands, wide)


def _interpreter() -> Interpreter:
    return Interpreter(lambda eqn, operands, _: bind_wide(eqn, operands), widen, stepwise=False)


def is_foreign(eqn: Equation) -> bool:
    """Return whether an operation runs as it was written in the reference too.

    A sampler, a Pallas kernel, a callback, a foreign or exported function, or a primitive with a body
    of unknown meaning.
    """
    name = eqn.primitive.name
    known = name in SCATTERS or name in _REDUCTIONS or _is_shard_map(eqn)
    return name in _FOREIGN or (_has_body(eqn.params) and not known)


def _is_shard_map(eqn: Equation) -> bool:
    construct = construct_of(eqn)
    return construct is not None and construct.name == "shard_map"


def _applied_wide(eqn: Equation) -> Callable[[Operand], Operand] | None:
    """Return the function of `x.at[i].apply(function)` in float64; None for any other scatter."""
    if not applies_function(eqn):
        return None
    body = Body(eqn.params["update_jaxpr"], tuple(eqn.params["update_consts"]))
    unused = np.zeros((), wide_dtype(eqn.invars[0].aval.dtype) or eqn.invars[0].aval.dtype)
    return lambda x: _interpreter().run(body, [x, unused])[0]


def _combined_wide(body: Body) -> Callable[..., list[Operand]]:
    return lambda before, x: _interpreter().run(body, [*before, *x])


def _reduce_wide(eqn: Equation, operands: Sequence[Operand]) -> list[Operand]:
    """Reduce with a computation in float64: the operands are arrays, then their initial values."""
    count = len(operands) // 2
    arrays, initial = list(operands[:count]), list(operands[count:])
    combine = _combined_wide(compat.body_of(eqn.params["jaxpr"]))
    return list(lax.reduce(arrays, initial, combine, eqn.params["dimensions"]))


def _reduce_window_wide(eqn: Equation, operands: Sequence[Operand]) -> list[Operand]:
    count, params = len(operands) // 2, eqn.params
    arrays, initial = list(operands[:count]), list(operands[count:])
    combine = _combined_wide(Body(params["jaxpr"], tuple(params["consts"])))
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    return list(lax.reduce_window(arrays, initial, combine, *(params[name] for name in names)))


_REDUCTIONS = {"reduce": _reduce_wide, "reduce_window": _reduce_window_wide}


def widen(x: Operand) -> Operand:
    """Return an array in float64 or complex128 where it is floating or complex, exactly.

    Needs 64-bit types to be enabled. An array that was put on devices stays on them.
    """
    if isinstance(x, jax.Ref):
        raise TypeError(
            f"found {jax.typeof(x)} from outside the function; expected a function without state: "
            "pass an array, and call jax.new_ref in the function"
        )
    dtype = wide_dtype(getattr(x, "dtype", None))
    if dtype is None or x.dtype == dtype:
        return x
    if isinstance(x, Tracer):
        return x.astype(dtype)
    wide = on_host(x)
    if not getattr(x, "committed", False):
        return wide
    with jax.ensure_compile_time_eval():  # a constant of a traced program
        return jax.device_put(wide, x.sharding)


def wide_dtype(dtype: Any) -> np.dtype | None:
    """Return float64 for a floating dtype, complex128 for a complex one, None for any other."""
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        return None
    complex_ = jnp.issubdtype(dtype, jnp.complexfloating)
    return np.dtype(np.complex128 if complex_ else np.float64)


def check_call(name: str, fn: Any, args: PyTree) -> None:
    """Raise TypeError where an assertion has no function to call, or an argument without values."""
    if not callable(fn):
        raise TypeError(f"{name} expects a function, got {fn!r}; write {name}(fn, x)")
    for x in jax.tree.leaves(args):
        if isinstance(x, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{name} computes with the values of arguments, got {x}; expected an array, such as "
                f"jnp.ones({x.shape}, {x.dtype.name!r})"
            )


def jitted(traced: TracedFunction) -> Callable[..., list[jax.Array]]:
    """Return a traced function, jitted in its own dtypes, as a function of its arrays."""
    body = compat.body_of(traced.closed)
    return jax.jit(lambda *arrays: compat.eval_jaxpr(body.jaxpr, body.consts, *arrays))


def as_received(x: Operand) -> jax.Array:
    """Return an argument in the dtype in which a jitted function receives it."""
    return jnp.asarray(x)


def on_host(x: Operand) -> Operand:
    """Return a NumPy array, in float64 or complex128 where it is floating or complex, exactly.

    An array of PRNG keys is returned unchanged.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return x
    # NumPy converts subnormal numbers too; XLA may flush them.
    return np.asarray(x).astype(wide_dtype(x.dtype) or x.dtype, copy=False)


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
