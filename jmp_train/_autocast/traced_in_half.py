"""Functions that `autocast` calls again with arrays in half precision, as torch's `custom_fwd` does.

Where a marked function is traced, its call is a `jit` of its own, and a table knows the function by
the jaxpr of that `jit`. A transformation of JAX makes another jaxpr, which the table does not have:
`autocast` calls again only what is as it was written.
"""

from __future__ import annotations

import contextvars
import functools
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import source_info_util

from jmp_train._autocast.flat import FlatCall, flat_call, is_array
from jmp_train._autocast.kinds import FLOAT32, HALF, kind_of_aval
from jmp_train._autocast.plan_operations import asks_for_precision
from jmp_train._autocast.plans import OpPlan
from jmp_train._autocast.regions import region_of
from jmp_train._jaxpr import compat
from jmp_train._jaxpr.bodies import bodies_of, construct_of
from jmp_train._jaxpr.compat import AbstractValue, Body, Equation, Jaxpr
from jmp_train.types import Function

F = TypeVar("F", bound=Function)

# The line that an equation was written in is the one that calls a marked function.
source_info_util.register_exclusion(__file__)


def traced_in_half(fn: F) -> F:
    """Let `autocast` call a function with arrays in its compute dtype, in place of casting inside.

    For a function that chooses what it computes by the dtype of its arguments, such as attention
    that is a kernel in half precision alone: traced in float32, it would have chosen another one
    before autocast could cast anything. Its float32 arrays are cast to the compute dtype, and what
    it returns counts in the dtype that it then has; inside, the function alone decides what is
    float32. This is what `torch.amp.custom_fwd(cast_inputs=...)` does. Without autocast, nothing
    changes: where the function is traced, it is a `jit` of its own.

    The operations inside are cast by the lists instead, as if it were not marked, where autocast
    cannot call the function: where it sees a derivative or a `vmap` of it (`autocast(jax.grad(f))`;
    `jax.grad(autocast(f))` calls it), where it uses traced arrays that are not its arguments, in a
    `shard_map` that autocast enters, where an argument is float64 or complex, where its
    results have another structure or other shapes in half precision, where it has read something that changed after the
    call, where a product inside asks for `precision="highest"`, in and around
    `with_precision("float32")`, and under rules that do not have `dot_general` in `compute`.

    Args:
      fn: a pure function of pytrees of arrays and of any other values. It gets copies of the
        pytrees, so that it must not change a module of NNX.

    Returns:
      A function of the same arguments with the same results and derivatives.

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

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        flat, arrays = flat_call(fn, args, kwargs, compat.is_staged_array, _is_tracer)
        if not arrays or getattr(jax.config, "jax_disable_jit", False):
            return fn(*args, **kwargs)
        call = _Call(flat)
        jitted = jax.jit(call.as_written())
        body = compat.body_of(jitted.trace(*arrays).jaxpr)
        if len(body.invars) == len(arrays):  # else it closes over traced arrays
            _CALLS[body.jaxpr] = call
        return flat.rebuild(jitted(*arrays))

    return wrapper  # type: ignore[return-value]


def _is_tracer(leaf: Any) -> bool:
    return isinstance(leaf, Tracer)


class _Call:
    """A call of a marked function, and what the code around it had set."""

    def __init__(self, flat: FlatCall):
        self.flat = flat
        self._context = contextvars.copy_context()
        self._narrow: dict[Any, Any] = {}

    def as_written(self) -> Function:
        """Return a new function of the traced arrays, of which JAX knows no jaxpr."""
        written = lambda *arrays: self.flat(*arrays)
        written.__name__ = written.__qualname__ = self.flat.name
        return written

    def in_half(self, dtype: np.dtype) -> Callable[..., list[Any]]:
        """Return the function of traced arrays with its other float32 arrays in `dtype`."""
        leaves = [
            jnp.asarray(x, dtype)
            if isinstance(x, (jax.Array, np.ndarray, np.generic)) and x.dtype == FLOAT32
            else x
            for x in self.flat.leaves
        ]

        def half(*arrays: Any) -> list[Any]:
            outs, tree = jax.tree.flatten(self._run(leaves, arrays))
            if tree != self.flat.results_tree:
                return []
            found = [outs[i] for i in self.flat.places]
            return found if all(map(is_array, found)) else []

        return half

    def is_as_written(self, body: Body) -> bool:
        """Return whether the function still does what it did when it was called.

        A marked function may read what is neither an argument nor a context variable, and changed since.
        """
        again = lambda *arrays: [
            out for out in jax.tree.leaves(self._run(self.flat.leaves, arrays)) if _is_tracer(out)
        ]
        traced = compat.body_of(compat.trace(again, [v.aval for v in body.invars]))
        return _text(traced) == _text(body)

    def results_in_half(self, dtype: np.dtype, avals: Sequence[Any]) -> list[Any]:
        """Return the types of the results in `dtype`; they are traced once."""
        key = (dtype, *avals)
        if key not in self._narrow:
            self._narrow[key] = compat.body_of(compat.trace(self.in_half(dtype), avals)).outvars
        return [v.aval for v in self._narrow[key]]

    def _run(self, leaves: Sequence[Any], arrays: Sequence[Any]) -> Any:
        """Return what the function returns, and store nothing; in a copy of the context."""
        return self._context.copy().run(self.flat.run, leaves, arrays)


#: The calls of marked functions, by the jaxpr of each.
_CALLS: weakref.WeakKeyDictionary[Jaxpr, _Call] = weakref.WeakKeyDictionary()


def plan_in_half(eqn: Equation, dtype: np.dtype) -> OpPlan | None:
    """Plan an equation that calls a marked function: what the function does with narrow arrays.

    Args:
      eqn: any equation.
      dtype: the dtype of the compute rule where the equation is.

    Returns:
      The plan; None where the equation calls no marked function, or the lists apply inside.
    """
    construct = construct_of(eqn)
    if construct is None or construct.name != "jit" or dtype not in HALF:
        return None
    (body,) = map(compat.body_of, bodies_of(eqn))
    call, avals = _CALLS.get(body.jaxpr), [atom.aval for atom in eqn.invars]
    if call is None or len(avals) != len(call.flat.where) or _has_its_own_precision(body):
        return None
    natives = [k and k.native for k in map(kind_of_aval, avals)]
    if FLOAT32 not in natives or not {None, FLOAT32, *HALF}.issuperset(natives):
        return None
    if any(jnp.issubdtype(a.dtype, np.complexfloating) for a in avals):
        return None
    dtypes = [dtype if d == FLOAT32 else d for d in natives]
    narrow = [compat.aval_like(a, d) if d else a for a, d in zip(avals, dtypes, strict=True)]
    try:
        with compat.context_of(eqn):
            if not call.is_as_written(body):
                return None
            results = call.results_in_half(dtype, narrow)
    except (NameError, jax.errors.UnexpectedTracerError):
        return None  # an axis of an outer `shard_map`, or an array of an outer trace
    written = [v.aval for v in eqn.outvars]
    if list(map(_apart_from_format, results)) != list(map(_apart_from_format, written)):
        return None
    outs = [kind_of_aval(a) for a in results]
    half = call.in_half(dtype)
    return OpPlan(eqn, "compute", dtype, dtypes, outs, "traced in half", in_half=half)


def _apart_from_format(aval: AbstractValue) -> tuple[Any, ...]:
    """Return the shape of an array, and its dtype where it is not a floating one."""
    return aval.shape, None if kind_of_aval(aval) else aval.dtype


def _text(body: Body) -> str:
    """Return a jaxpr as text, without the addresses of the functions that its equations keep."""
    return re.sub(r"\b0x[0-9a-f]+", "", str(body.jaxpr))


def _has_its_own_precision(body: Body) -> bool:
    """Return whether a product in a body asks for full precision, or a part of it is a region."""
    return any(
        asks_for_precision(eqn.params.get("precision"))
        or region_of(eqn, None) is not None
        or (
            construct_of(eqn)
            and any(_has_its_own_precision(compat.body_of(b)) for b in bodies_of(eqn))
        )
        for eqn in body.eqns
    )
