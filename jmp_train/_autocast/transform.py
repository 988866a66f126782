"""Op-level mixed precision for any JAX function, written in float32 or not: torch.autocast for JAX.

`autocast(fn)` traces `fn` and runs it again with casts: matrix products and convolutions in half
precision; exponentials, logarithms, powers and sums in float32; everything else in the widest
dtype among its operands. The lists are those of torch.autocast, as JAX primitives; see
`jmp_train._autocast.op_rules`. It goes inside `jit`, `scan`, `while_loop`, `cond`, `switch`,
`checkpoint`, `custom_jvp`, `custom_vjp`, `vmap` and `shard_map`, and `grad`, `jvp`, `vmap` and
`jit` apply to what it returns, or the other way round.

Only operations that were written in float32 are lowered. float64 stays, and so does a product that
the author wrote in half precision already. Kernels, callbacks and factorisations receive the dtypes
that they were written for.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import jax
from jax.extend.core.primitives import convert_element_type_p

from jmp_train._autocast.emit import Emitter
from jmp_train._autocast.emit_bodies import EMITTERS_OF_BODIES
from jmp_train._autocast.kinds import kind_of_aval, parse_compute_dtype
from jmp_train._autocast.op_rules import OpRules, default_op_rules
from jmp_train._autocast.planner import Planner
from jmp_train._autocast.regions import inner_name
from jmp_train._autocast.traced import TracedFunction
from jmp_train._autocast.values import value_of
from jmp_train._jaxpr.compat import AbstractValue, Operand
from jmp_train.types import Function

F = TypeVar("F", bound=Function)


def autocast(fn: F, compute_dtype: Any = "bfloat16", *, rules: OpRules = default_op_rules) -> F:
    """Return `fn` with its contractions in `compute_dtype` and its delicate operations in float32.

    | the operation | its dtype |
    | --- | --- |
    | in `rules.compute`, with an operand written in float32 | `compute_dtype` |
    | in `rules.float32` | float32 (float64 where an operand is float64) |
    | in `rules.promote` | the widest floating dtype among its operands as they now are |
    | in no list | as written: its operands are cast back |
    | inside `with_precision(d)` | `d` where written in float32, else as written |

    A number in the code (`x * 0.5`) adapts to its operand, where the half format can represent it:
    `1e-8` and `-1e30` next to a float16 array make the operation float32. A sum that float32
    operations alone read is formed in float32, as in softmax's `exp(x - max(x))`.

    An inner product (`vdot`) is a sum and runs in float32. So does a product of logarithms with
    zeros and ones made from a comparison, such as `log_softmax(x) @ one_hot`. A loss that begins
    with other arithmetic on half-precision logits (`optax.losses.dice_loss`) needs
    `with_precision("float32")` to stay in float32.

    Loop carries and the outputs of `fn` keep their dtypes. Derivative rules (`custom_jvp`,
    `custom_vjp`) stay in use and run under the same autocast; a residual that is a constant keeps
    its value. One array is cast to one dtype once; a loop's weights are cast before it, and their
    gradient is still summed in float32.

    A product keeps float32 where the author asked for it: with `precision=HIGHEST` or a
    `DotAlgorithm`, or, for the result alone, a `preferred_element_type` wider than the operands.

    Args:
      fn: a pure function. Arrays anywhere in its arguments are traced; every other leaf (Python
        numbers, strings, None, functions) reaches it unchanged. It is traced at every call, so
        put `jax.jit` around the outermost function.
      compute_dtype: `"bfloat16"` or `"float16"`; `"float32"` changes nothing that was written in
        float32. float16 needs a loss scale for gradients; see `value_and_grad`.
      rules: the lists of primitives; see `OpRules.extend`.

    Returns:
      A function of the same arguments with the same outputs, in the same dtypes.

    Raises:
      ValueError: for another compute dtype.
      TypeError: where `fn` is not callable.

    >>> import jax.numpy as jnp
    >>> def attend(q, k, v):
    ...     return jax.nn.softmax(q @ k.T) @ v
    >>> x = jnp.ones((4, 8))
    >>> autocast(attend)(x, x, x).dtype
    dtype('float32')
    >>> jaxpr = jax.make_jaxpr(autocast(attend))(x, x, x)
    >>> [str(e.outvars[0].aval) for e in jaxpr.eqns if e.primitive.name in ("dot_general", "exp")]
    ['bfloat16[4,4]', 'float32[4,4]', 'bfloat16[4,8]']
    """
    if not callable(fn):
        raise TypeError(f"autocast expects a function, got {fn!r}; write autocast(fn)(x)")
    compute = parse_compute_dtype(compute_dtype)
    if not isinstance(rules, OpRules):
        raise TypeError(f"rules is {rules!r}; expected an OpRules, such as default_op_rules")

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        traced = TracedFunction(fn, args, kwargs)
        planner = Planner(compute, rules)
        plan = traced.plan(planner)
        with jax.named_scope(inner_name(compute)):
            values = map(value_of, traced.kinds, traced.arrays)
            outs = Emitter(planner, EMITTERS_OF_BODIES).run(plan, list(values))
            avals = [v.aval for v in plan.body.outvars]
            return traced.rebuild([_as_written(v, a) for v, a in zip(outs, avals, strict=True)])

    return wrapped  # type: ignore[return-value]


def _as_written(value: Operand, aval: AbstractValue) -> Any:
    """Return an output in the dtype that the function had, as an array."""
    kind = kind_of_aval(aval)
    if kind is None:
        return value if isinstance(value, jax.Array) else jax.numpy.asarray(value)
    out = value.get(kind.native)
    out = out if isinstance(out, jax.Array) else jax.numpy.asarray(out)
    if aval.weak_type:
        weak = {"new_dtype": kind.native, "weak_type": True, "sharding": None}
        out = convert_element_type_p.bind(out, **weak)
    return out
