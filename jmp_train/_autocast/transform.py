"""Op-level mixed precision for any JAX function, written in float32 or not: torch.autocast for JAX.

`autocast(fn)` traces `fn` and runs it again with casts: matrix products and convolutions in half
precision; exponentials, logarithms, powers and sums in float32; everything else in the widest
dtype among its operands. The lists are those of torch.autocast, as JAX primitives; see
`jmp_train._autocast.op_rules`. It goes inside `jit`, `scan`, `while_loop`, `cond`, `switch`,
`checkpoint`, `custom_jvp`, `custom_vjp`, `vmap` and `shard_map`, and `grad`, `jvp`, `vmap` and
`jit` apply to what it returns, or the other way round.

What is lowered is what was written in float32. float64 stays, and so does a product that the
author wrote in half precision already. What a kernel, a callback or a factorisation is handed has
the dtype that it was written for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

import jax
import numpy as np
from jax.extend.core.primitives import convert_element_type_p

from jmp_train._autocast.emit import Emitter, value_of
from jmp_train._autocast.op_rules import OpRules, default_op_rules
from jmp_train._autocast.plan import (
    FLOAT32,
    HALF,
    OpPlan,
    Plan,
    Planner,
    compute_name,
    held_name,
    inner_name,
    kind_of_aval,
    kind_of_input,
    region_name,
)
from jmp_train._jaxpr import compat
from jmp_train.numerics.dtypes import parse_dtype

F = TypeVar("F", bound=Callable[..., Any])


def autocast(fn: F, compute_dtype: Any = "bfloat16", *, rules: OpRules = default_op_rules) -> F:
    """`fn` with its contractions in `compute_dtype` and its delicate operations in float32.

    | the operation | its dtype |
    | --- | --- |
    | in `rules.compute`, with an operand written in float32 | `compute_dtype` |
    | in `rules.float32` | float32 (float64 where an operand is float64) |
    | in `rules.promote` | the widest floating dtype among its operands as they now are |
    | in no list | as written: its operands are cast back |
    | inside `with_precision(d)` | `d` where written in float32, else as written |

    A number in the code (`x * 0.5`) adapts to its operand, as long as the half format holds it:
    `1e-8` and `-1e30` next to a float16 array make the operation float32. A sum that float32
    operations alone read is formed in float32, as in softmax's `exp(x - max(x))`.

    An inner product (`vdot`) is a sum and runs in float32. So does a product of logarithms with
    zeros and ones made from a comparison, such as `log_softmax(x) @ one_hot`. A loss that begins
    with other arithmetic on half-precision logits (`optax.losses.dice_loss`) needs
    `with_precision("float32")` to stay in float32.

    Loop carries and the outputs of `fn` keep their dtypes. Derivative rules (`custom_jvp`,
    `custom_vjp`) stay the ones that are used, and run under the same autocast; a residual that is
    a constant keeps its value. One array is cast
    to one dtype once; a loop's weights are cast before it, and their gradient is still summed up
    in float32.

    A product keeps float32 where the author asked for it: with `precision=HIGHEST` or a
    `DotAlgorithm`, or, for the result alone, a `preferred_element_type` wider than the operands.

    Args:
      fn: a pure function. Arrays anywhere in its arguments are traced; every other leaf (Python
        numbers, strings, None, functions) reaches it as it is. It is traced at every call, so
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
    compute = _compute_dtype(compute_dtype)
    if not isinstance(rules, OpRules):
        raise TypeError(f"rules is {rules!r}; expected an OpRules, such as default_op_rules")

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        traced = _Traced(fn, args, kwargs)
        planner = Planner(compute, rules)
        plan = traced.plan(planner)
        with jax.named_scope(inner_name(compute)):
            values = map(value_of, traced.kinds, traced.arrays)
            outs = Emitter(planner).run(plan, list(values))
            avals = [v.aval for v in plan.body.outvars]
            return traced.rebuild([_as_written(v, a) for v, a in zip(outs, avals, strict=True)])

    return wrapped  # type: ignore[return-value]


class _Region(contextlib.ContextDecorator):
    """What `with_precision` returns; made anew for every use, so it holds no state of its own."""

    def __init__(self, name: str):
        self.name = name
        self._scopes: list[contextlib.ExitStack] = []

    def _recreate_cm(self) -> _Region:
        return _Region(self.name)

    def __enter__(self) -> Self:
        scope = contextlib.ExitStack()
        scope.enter_context(jax.named_scope(self.name))
        self._scopes.append(scope)
        return self

    def __exit__(self, *error: object) -> None:
        self._scopes.pop().close()


def with_precision(dtype: Any = "float32") -> _Region:
    """Marks code for `autocast` to run in a dtype of its own; without autocast it does nothing.

    What was written in float32 inside runs in `dtype`: with `"float32"` the region is left alone.
    A function decorator and a context manager. The mark is a name scope, the one thing that every
    transformation of JAX carries along, so it holds under `jit`, `grad`, `vmap` and `scan`, and
    for the backward pass of what it marks; profilers show it. Of nested regions the innermost
    holds.

    Args:
      dtype: `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
      ValueError: for another dtype.
      TypeError: for a function in the place of the dtype, `@with_precision` without a call.

    >>> import jax.numpy as jnp
    >>> @with_precision("float32")
    ... def solve(a, b):
    ...     return a @ b
    >>> jaxpr = jax.make_jaxpr(autocast(lambda a: solve(a, a) @ a))(jnp.ones((2, 2)))
    >>> [str(e.outvars[0].aval) for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    ['float32[2,2]', 'bfloat16[2,2]']
    """
    if inspect.isroutine(dtype):
        raise TypeError(
            f"with_precision expects a dtype; write @with_precision('float32'), not {dtype!r}"
        )
    return _Region(region_name(_compute_dtype(dtype)))


def compute_in(dtype: Any) -> _Region:
    """Marks code whose compute dtype under `autocast` is its own; without autocast it does nothing.

    The lists of operations hold inside as they do outside: contractions run in `dtype`, what is
    delicate in float32. (`with_precision` gives everything inside one dtype.) A function decorator
    and a context manager; of nested marks the innermost holds.

    Args:
      dtype: `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
      ValueError: for another dtype.

    >>> import jax.numpy as jnp
    >>> def model(x):
    ...     x = x @ x
    ...     with compute_in("float16"):
    ...         return jnp.exp(x @ x)
    >>> jaxpr = jax.make_jaxpr(autocast(model, "bfloat16"))(jnp.ones((2, 2)))
    >>> [(e.primitive.name, e.outvars[0].aval.dtype.name) for e in jaxpr.eqns
    ...  if e.primitive.name in ("dot_general", "exp")]
    [('dot_general', 'bfloat16'), ('dot_general', 'float16'), ('exp', 'float32')]
    """
    return _Region(compute_name(_compute_dtype(dtype)))


def hold(x: jax.Array, dtype: Any) -> jax.Array:
    """Hands a float32 array over in another dtype under `autocast`, while it stays float32 to the code.

    What comes after reads it as if an operation had run in `dtype`: a sum of two arrays held in
    bfloat16 is formed in bfloat16, and it takes half the memory. Without autocast it is rounded
    to `dtype` and no more. An array that is not float32 comes back as it is.

    Args:
      x: any array.
      dtype: `"float32"` (which takes a half-precision one back to float32), `"bfloat16"` or
        `"float16"`.

    >>> import jax.numpy as jnp
    >>> jaxpr = jax.make_jaxpr(autocast(lambda x: jnp.sin(hold(x, "bfloat16"))))(jnp.ones(2))
    >>> [(e.primitive.name, e.outvars[0].aval.dtype.name) for e in jaxpr.eqns][:2]
    [('convert_element_type', 'bfloat16'), ('sin', 'bfloat16')]
    """
    dtype = _compute_dtype(dtype)
    if x.dtype != np.float32:
        return x
    with jax.named_scope(held_name(dtype)):
        if dtype == np.float32:
            return jax.lax.reduce_precision(x, 8, 23)  # in no list, so its operand is float32
        return x.astype(dtype).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class OpRow:
    """One operation, as autocast will run it.

    Attributes:
      path: the bodies that it lies in, outermost first, such as `"jit:step/scan"`.
      op: the primitive's name.
      dtype: what its operands are cast to, such as `"bfloat16"`.
      written: the dtype that it was traced with.
      rule: `"compute"`, `"float32"`, `"promote"`, `"region"`, `"cast"` (the author's own) or
        `"as written"`.
      note: what else led to it, often empty.
      scope: the name scope that it was written in (Linen puts its module path there).
      source: file, line and function.
    """

    path: str
    op: str
    dtype: str
    written: str
    rule: str
    note: str
    scope: str
    source: str


@dataclasses.dataclass(frozen=True)
class AutocastReport:
    """What `explain_autocast` returns; `str()` of it is a table, `rows` the same as data."""

    rows: tuple[OpRow, ...]

    def __str__(self) -> str:
        head = ("path", "op", "written", "runs in", "rule", "source")
        lines = [head, *map(_cells, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        padded = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
        return "\n".join(padded)


def explain_autocast(
    fn: Callable[..., Any],
    *args: Any,
    compute_dtype: Any = "bfloat16",
    rules: OpRules = default_op_rules,
    **kwargs: Any,
) -> AutocastReport:
    """Each operation of `fn(*args, **kwargs)`, the dtype that it would run in, and why.

    Nothing is computed: arguments may be `jax.ShapeDtypeStruct`s. Operations on integers alone
    are left out. Derivative rules are not shown, but explaining `jax.grad(loss)` shows what they
    did.

    Args:
      fn, *args, **kwargs: the function and its arguments.
      compute_dtype, rules: as for `autocast`.

    Raises:
      As `autocast`.

    >>> import jax.numpy as jnp
    >>> report = explain_autocast(lambda x: jnp.exp(x @ x), jnp.ones((2, 2)))
    >>> [(row.op, row.dtype, row.rule) for row in report.rows]
    [('dot_general', 'bfloat16', 'compute'), ('exp', 'float32', 'float32')]
    """
    traced = _Traced(fn, args, kwargs)
    planner = Planner(_compute_dtype(compute_dtype), rules)
    plan = traced.plan(planner)
    return AutocastReport(tuple(_rows(plan, ())))


class _Traced:
    """A function traced to a jaxpr of its arrays; its other arguments and results are kept."""

    def __init__(self, fn: Callable[..., Any], args: Any, kwargs: Any):
        leaves, tree = jax.tree.flatten((args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
        self.arrays = [leaves[i] for i in where]
        self._outs: list[Any] = []
        self._places: list[int] = []
        self._tree: Any = None

        def flat(*arrays: Any) -> Any:
            full = list(leaves)
            for i, array in zip(where, arrays, strict=True):
                full[i] = array
            args, kwargs = jax.tree.unflatten(tree, full)
            outs, self._tree = jax.tree.flatten(fn(*args, **kwargs))
            self._places = [i for i, out in enumerate(outs) if isinstance(out, jax.Array)]
            traced = [outs[i] for i in self._places]
            for i in self._places:  # no tracer outlives its trace
                outs[i] = None
            self._outs = outs
            return traced

        name = getattr(fn, "__name__", type(fn).__name__)
        self.closed = compat.trace(flat, self.arrays, name)
        self.kinds = [kind_of_input(v.aval) for v in compat.body_of(self.closed).invars]

    def plan(self, planner: Planner) -> Plan:
        return planner.plan(self.closed, self.kinds, kept=len(self._places))

    def rebuild(self, arrays: Sequence[Any]) -> Any:
        """What the function returned, with its arrays replaced."""
        full = list(self._outs)
        for i, array in zip(self._places, arrays, strict=True):
            full[i] = array
        return jax.tree.unflatten(self._tree, full)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def _as_written(value: Any, aval: Any) -> Any:
    """An output in the dtype that the function had, as an array."""
    kind = kind_of_aval(aval)
    if kind is None:
        return value if isinstance(value, jax.Array) else jax.numpy.asarray(value)
    out = value.get(kind.native)
    out = out if isinstance(out, jax.Array) else jax.numpy.asarray(out)
    if aval.weak_type:
        weak = {"new_dtype": kind.native, "weak_type": True, "sharding": None}
        out = convert_element_type_p.bind(out, **weak)
    return out


def _compute_dtype(name: Any) -> np.dtype:
    dtype = parse_dtype(name)
    if dtype not in (FLOAT32, *HALF):
        raise ValueError(f"autocast to {dtype.name}; expected bfloat16, float16 or float32")
    return dtype


def _rows(plan: Plan, path: tuple[str, ...]) -> Iterator[OpRow]:
    for op in plan.ops:
        for name, sub in _bodies(op):
            yield from _rows(sub, (*path, name))
        if op.dtype is not None and op.rule != "enter":
            yield _row(op, path)


def _bodies(op: OpPlan) -> Iterator[tuple[str, Plan]]:
    params, name = op.eqn.params, op.eqn.primitive.name
    called = params.get("name") or compat.function_name(params.get("call_jaxpr"))
    for i, sub in enumerate(op.subs):
        if name == "while":
            yield f"while/{('cond', 'body')[i]}", sub
        elif name == "cond":
            yield f"cond/{i}", sub
        else:
            yield (f"{name}:{called}" if called else name), sub


def _row(op: OpPlan, path: tuple[str, ...]) -> OpRow:
    avals = [kind_of_aval(atom.aval) for atom in (*op.eqn.invars, *op.eqn.outvars)]
    before = dict.fromkeys(k.native.name for k in avals if k)
    return OpRow(
        "/".join(path),
        op.eqn.primitive.name,
        op.dtype.name if op.dtype else "",
        "/".join(before),
        op.rule,
        op.note,
        str(op.eqn.source_info.name_stack),
        compat.source_line(op.eqn),
    )


def _cells(row: OpRow) -> tuple[str, ...]:
    rule = f"{row.rule}: {row.note}" if row.note else row.rule
    where = f"{row.source} in {row.scope}" if row.scope else row.source
    return (row.path or "-", row.op, row.written, row.dtype, rule, where)
