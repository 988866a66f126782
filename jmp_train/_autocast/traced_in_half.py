"""Functions that `autocast` calls again with arrays in half precision, as torch's `custom_fwd` does.

The mark is a `custom_jvp` whose rule is the derivative of the function itself: one equation of the
program has the whole function, under every transformation that leaves it as it was written. That it
is as it was written is checked: the function is traced again, and has to give the same jaxpr.
"""

from __future__ import annotations

import collections
import functools
import re
import weakref
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer
from jax.extend import source_info_util

from jmp_train._autocast.kinds import FLOAT32, HALF, is_array, kind_of_aval, native_dtype
from jmp_train._autocast.plan_operations import asks_for_precision
from jmp_train._autocast.plans import OpPlan
from jmp_train._jaxpr import compat
from jmp_train._jaxpr.bodies import NUMBER, bodies_of, construct_of
from jmp_train._jaxpr.compat import AbstractValue, Body, Equation
from jmp_train.types import Function

F = TypeVar("F", bound=Function)

# The line that an equation was written in is the one that calls a marked function.
source_info_util.register_exclusion(__file__)

#: Marked functions as functions of arrays alone, each by the name that its equations keep.
_BY_NAME: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_used: collections.Counter[str] = collections.Counter()


def traced_in_half(fn: F) -> F:
    """Let `autocast` call a function with arrays in its compute dtype, in place of casting inside.

    For a function that chooses what it computes by the dtype of its arguments, such as attention
    that is a kernel in half precision alone: traced in float32, it would have chosen another one
    before autocast could cast anything. Its float32 arrays are cast to the compute dtype, and what
    it returns counts in the dtype that it then has; inside, the function alone decides what is
    float32. This is what `torch.amp.custom_fwd(cast_inputs=...)` does. Without autocast, and where
    no argument is a float32 array, nothing changes.

    The operations inside are cast by the lists instead, as if it were not marked, where autocast
    cannot call the function: where it sees a derivative or a `vmap` of it (`autocast(jax.grad(f))`;
    `jax.grad(autocast(f))` calls it), in a `shard_map` that autocast enters, where a product inside
    asks for `precision="highest"`, in `with_precision("float32")`, and under rules that do not have
    `dot_general` in `compute`.

    Args:
      fn: a pure function of pytrees of arrays; other leaves have to be hashable. Every array that it
        is differentiated by is an argument. Its results have the same shapes for each dtype.

    Returns:
      A function of the same arguments with the same results and derivatives.

    Raises:
      TypeError: when called with a leaf that is neither an array nor hashable, or where `fn` closes
        over an array that is traced.

    >>> import jax.numpy as jnp
    >>> from jmp_train import autocast
    >>> @traced_in_half
    ... def attend(q, k):
    ...     kernel = q.dtype in (jnp.bfloat16, jnp.float16)  # as a fused kernel has it
    ...     return jnp.tanh(q @ k) if kernel else jnp.sin(q @ k)
    >>> jaxpr = str(jax.make_jaxpr(autocast(attend))(jnp.ones((2, 2)), jnp.ones((2, 2))))
    >>> "tanh" in jaxpr, "sin" in jaxpr
    (True, False)
    """
    flat_functions: dict[Hashable, Any] = {}  # while `fn` exists

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _check_closure(fn)
        leaves, tree = jax.tree.flatten((args, kwargs))
        traced = tuple(map(is_array, leaves))
        static = tuple(x for x, array in zip(leaves, traced, strict=True) if not array)
        key = (tree, traced, tuple(map(type, static)), static)
        try:
            known = key in flat_functions
        except TypeError:
            name = getattr(fn, "__name__", type(fn).__name__)
            wrong = next(x for x in static if not isinstance(x, Hashable))
            raise TypeError(f"{name} expects arrays and hashable values, got {wrong!r}") from None
        if not known:
            flat_functions[key] = _flat(fn, tree, traced, static)
        arrays = [x for x, array in zip(leaves, traced, strict=True) if array]
        return flat_functions[key](*arrays)

    return wrapper  # type: ignore[return-value]


def _check_closure(fn: Function) -> None:
    """Raise TypeError if a function closes over an array that is being traced."""
    names = getattr(getattr(fn, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, getattr(fn, "__closure__", None) or (), strict=True):
        try:
            leaves = jax.tree.leaves(cell.cell_contents)
        except ValueError:  # a name that has no value yet
            continue
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            called = getattr(fn, "__name__", type(fn).__name__)
            raise TypeError(
                f"{called} closes over {name}, which is traced; make it an argument of {called}, "
                "so that traced_in_half can cast it and pass its gradient"
            )


def _flat(fn: Function, tree: Any, traced: Sequence[bool], static: Sequence[Hashable]) -> Any:
    """Return a marked function of arrays alone."""

    def flat(*arrays: Any) -> Any:
        rest, others = iter(arrays), iter(static)
        args, kwargs = jax.tree.unflatten(tree, [next(rest if x else others) for x in traced])
        return fn(*args, **kwargs)

    name = getattr(fn, "__name__", type(fn).__name__)
    _used[name] += 1
    flat.__name__ = flat.__qualname__ = f"{name}{NUMBER}{_used[name]}"
    _BY_NAME[flat.__name__] = flat
    marked = jax.custom_jvp(flat)
    marked.defjvp(lambda primals, tangents: jax.jvp(flat, primals, tangents))
    return marked


def plan_in_half(eqn: Equation, dtype: np.dtype) -> OpPlan | None:
    """Plan an equation that calls a marked function: what the function does with narrow arrays.

    Args:
      eqn: any equation.
      dtype: the dtype of the compute rule where the equation is.

    Returns:
      The plan; None where the equation calls no marked function, or the lists apply inside.
    """
    construct = construct_of(eqn)
    if construct is None or construct.name != "custom_jvp" or dtype not in HALF:
        return None
    consts = eqn.params["num_consts"]  # operands that the function made itself
    avals = [atom.aval for atom in eqn.invars[consts:]]
    dtypes = [dtype if k and k.native == FLOAT32 else None for k in map(kind_of_aval, avals)]
    (called,) = map(compat.body_of, bodies_of(eqn))
    flat = _BY_NAME.get(compat.function_name(called))
    if flat is None or not any(dtypes) or _asks_for_float32(called):
        return None
    narrow = [compat.aval_like(a, d) if d else a for a, d in zip(avals, dtypes, strict=True)]
    with compat.context_of(eqn):
        if not _is_as_written(flat, avals, called):
            return None
        body = _traced(flat, narrow)
    if [v.aval.shape for v in body.outvars] != [v.aval.shape for v in eqn.outvars]:
        return None
    outs = [kind_of_aval(v.aval) for v in body.outvars]
    exact = [d or native_dtype(kind_of_aval(a)) for d, a in zip(dtypes, avals, strict=True)]
    exact = [None] * consts + exact
    return OpPlan(eqn, "compute", dtype, exact, outs, "traced in half", in_half=body)


def _traced(flat: Any, avals: Sequence[AbstractValue]) -> Body:
    """Trace a function anew: JAX keeps the jaxpr of one that it knows, whatever it has read since."""
    return compat.body_of(compat.trace(lambda *arrays: flat(*arrays), avals))


def _is_as_written(flat: Any, avals: Sequence[AbstractValue], called: Body) -> bool:
    """Return whether a body is a function on arrays of these types."""
    try:
        body = _traced(flat, avals)
    except Exception:  # noqa: BLE001  (of the function: under `vmap`, its arrays have another axis)
        return False
    return _text(body) == _text(called)


def _text(body: Body) -> str:
    """Return a jaxpr as text, without the addresses of the functions that its equations keep, and
    with its constants as its first inputs, as a `custom_jvp` has them."""
    return re.sub(r"[\s;]+", " ", re.sub(r"\b0x[0-9a-f]+", "", str(body.jaxpr)))


def _asks_for_float32(body: Body) -> bool:
    """Return whether a product in a body asks for full precision."""
    return any(
        asks_for_precision(eqn.params.get("precision"))
        or (construct_of(eqn) and any(_asks_for_float32(compat.body_of(b)) for b in bodies_of(eqn)))
        for eqn in body.eqns
    )
