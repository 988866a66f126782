"""Which operations of a computation went non-finite first: a replay, operation by operation.

A skipped step has changed nothing, so it can be computed again, slowly: each operation by itself,
its result looked at, and every infinity or NaN traced to the operations that made it out of finite
numbers. What led to a non-finite result is found backwards from it, through non-finite values alone,
so the -inf of an attention mask, which softmax turned into zeros, is never named.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train._jaxpr import compat
from jmp_train.numerics.dtypes import is_floating
from jmp_train.tree import all_finite, path_name


class OperandRange(NamedTuple):
    """What an operand of an operation held."""

    dtype: str
    smallest: float  # of its finite values; NaN where it has none
    largest: float
    argument: str  # the argument that it is, cast or reshaped at most; '' for none
    infinities: int = 0  # how many of its values are infinite
    nans: int = 0

    def __str__(self) -> str:
        if not np.isnan(self.smallest):
            return f"{self.dtype} [{self.smallest:.3g}, {self.largest:.3g}]"
        held = [f"{self.infinities} infinite"] * bool(self.infinities)
        held += [f"{self.nans} NaN"] * bool(self.nans)
        return f"{self.dtype} [{'no finite value: ' + ', '.join(held) if held else 'no value'}]"


@dataclasses.dataclass(frozen=True)
class NonFiniteOp:
    """One operation that made infinities or NaNs.

    Attributes:
      op: the primitive's name, such as `"dot_general"`.
      kind: `"overflow"` (the result is finite in a wider format), `"nan"` or `"inf"`.
      dtype: of the result, such as `"float16"`.
      shape: of the result.
      count: how many of its values are not finite.
      backward: whether it belongs to a backward pass.
      module: where it lies in the model: its name scope (Linen puts the module's path there), else
        the path of an argument that it reads or whose gradient it is, else `"after "` and the last
        argument that was read before it.
      path: the bodies that it lies in, outermost first, such as `"scan[3]/jit:gelu"`; a number is
        the iteration, from 0.
      source: file and line of the code that wrote it, Flax's and JAX's own apart.
      operands: the range of each floating operand.
      wide: the largest magnitude that the result has in the wider format; None where it is not
        finite there either, or the operation could not be run in one.
      reaches: the results of the function that it made non-finite.
    """

    op: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    backward: bool
    module: str
    path: str
    source: str
    operands: tuple[OperandRange, ...]
    wide: float | None
    reaches: tuple[str, ...]

    @property
    def largest_input(self) -> float:
        """The largest finite magnitude among the operands; 0 without any."""
        ends = [abs(end) for o in self.operands for end in (o.smallest, o.largest)]
        return max((end for end in ends if not np.isnan(end)), default=0.0)

    def __str__(self) -> str:
        way = "backward" if self.backward else "forward"
        where = " of ".join(filter(None, (self.path, self.module)))
        ranges = ", ".join(map(str, self.operands))
        if self.kind == "overflow":
            limit = float(jnp.finfo(self.dtype).max)
            wider = f"; {self.wide:.3g} in {_wider(self.dtype).name}" if self.wide else ""
            what = f"overflow of {self.dtype} (largest {limit:.5g}{wider})"
        else:
            what = f"{ {'nan': 'NaN', 'inf': 'infinity'}[self.kind] } in {self.dtype}"
        size = int(np.prod(self.shape, dtype=np.int64))
        return (
            f"{self.op} ({way}{', ' + where if where else ''}): {what}, {self.count} of {size} "
            f"values, from {ranges or 'no floating operand'}; {self.source}"
        )


@dataclasses.dataclass(frozen=True)
class NonFiniteReport:
    """What `first_nonfinite` found; `str()` of it is a line for each finding.

    Attributes:
      results: the results that are not finite, by path; empty where all are finite.
      arguments: the arguments that are not finite themselves and led to them; where nothing else
        did, `"a constant"`: of the function's code, an array that it closes over, or a plain number.
      ops: the operations that led to them out of finite numbers, in the order in which they ran. If
        there is none, those that made a NaN out of infinities that the function was given; and if
        there is none of these and no argument, those that read a constant that is not finite.
    """

    results: tuple[str, ...]
    arguments: tuple[str, ...]
    ops: tuple[NonFiniteOp, ...]

    def __str__(self) -> str:
        if not self.results:
            return "every result is finite"
        given = [f"{name} is not finite as it was given" for name in self.arguments]
        return "\n".join([*given, *map(str, self.ops)])


def first_nonfinite(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> NonFiniteReport:
    """Computes `fn(*args, **kwargs)` an operation at a time and names what went non-finite first.

    Give it the function whose result is not finite, gradients included: the `jax.value_and_grad` of
    a loss, say. It enters jit, scan, while, cond, remat, custom_jvp and custom_vjp; a loop is run
    compiled first, and iteration by iteration only where its result is not finite. It runs on
    concrete arrays, not under jit, and is slow: for when something is wrong.

    Compiled, XLA may keep an intermediate result in float32 that the program rounds to 16 bits; here
    every operation is rounded as the program says. So a step that went just over the edge may come
    out finite here, and the other way round.

    Args:
      fn: a JAX function of arrays.
      *args, **kwargs: its arguments, pytrees; what is no array is handed to it as it is.

    Raises:
      What `fn` raises.

    >>> def loss(w, x):
    ...     return jnp.sum(jnp.log(w * x))
    >>> report = first_nonfinite(jax.value_and_grad(loss), jnp.ones(3), jnp.array([1.0, 0.0, 2.0]))
    >>> [(op.op, op.kind, op.backward, op.reaches) for op in report.ops]
    [('log', 'inf', False, ('0',)), ('div', 'inf', True, ('1',))]

    The mask here is infinite too, and harmless:

    >>> def masked(w):
    ...     return jnp.sum(jax.nn.softmax(jnp.where(jnp.array([True, False]), w, -jnp.inf)) ** 2)
    >>> print(first_nonfinite(jax.value_and_grad(masked), jnp.ones(2)))
    every result is finite
    """
    names, leaves, call = _named_arguments(fn, args, kwargs)
    arrays = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

    def flat(*values: Any) -> Any:
        full = list(leaves)
        for i, value in zip(arrays, values, strict=True):
            full[i] = value
        return call(full)

    closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*(leaves[i] for i in arrays))
    outs = [path_name(path) or "result" for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    replay = _Replay()
    given = [replay.given(leaves[i], names[i]) for i in arrays]
    body = compat.body_of(closed)
    return replay.report(outs, replay.run(body, given, _Place()))


class _Node:
    """One thing that was not finite: an operation's result, an argument or a constant."""

    def __init__(self, order: int, parents: tuple[_Node, ...] = ()):
        self.order = order
        self.parents = parents
        self.argument = ""
        self.constant = False
        self.made: _Made | None = None  # of an operation that the chain may begin at


class _Made(NamedTuple):
    """An operation that made what is not finite, to be described if a chain ends at it."""

    eqn: Any
    operands: list[_Value]
    out: Any
    place: _Place
    after: str
    rank: int  # 0: out of finite numbers; 1: a NaN out of infinities; 2: it read a constant


class _Value(NamedTuple):
    """An array under replay."""

    array: Any
    causes: tuple[_Node, ...] = ()  # what its infinities and NaNs come from; none if it is finite
    argument: str = ""  # the argument that it is, cast or reshaped at most


class _Place(NamedTuple):
    """Where an equation lies."""

    path: tuple[str, ...] = ()
    stack: str = ""

    def inside(self, eqn: Any, name: str) -> _Place:
        return _Place((*self.path, name), f"{self.stack}/{eqn.source_info.name_stack}")


# Operations that hand on an argument under another shape or dtype.
_VIEWS = frozenset(
    {
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "dynamic_slice",
        "expand_dims",
        "reduce_precision",
        "reshape",
        "rev",
        "slice",
        "squeeze",
        "transpose",
    }
)
_BODIES = {  # primitives that evaluate one body once, and the parameter that holds it
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


class _Replay:
    """Evaluates a jaxpr, keeping for what is not finite where it comes from."""

    def __init__(self) -> None:
        self._count = itertools.count()
        self._after = ""

    def given(self, array: Any, name: str) -> _Value:
        """An argument (with a name) or a constant; integers and scalars tell no place in a model."""
        if _finite(array):
            return _Value(array, (), name if _inexact(array) and np.ndim(array) else "")
        node = _Node(next(self._count))
        node.argument, node.constant = name, not name
        return _Value(array, (node,), name)

    def run(self, body: compat.Body, args: Sequence[_Value], place: _Place) -> list[_Value]:
        """The results of a body; arrays are let go after their last use."""
        consts = [self.given(const, "") for const in body.consts]
        env: dict[Any, _Value] = dict(zip(body.all_invars, (*consts, *args), strict=True))
        last = {v: i for i, eqn in enumerate(body.eqns) for v in eqn.invars if _is_var(v)}
        last |= {v: len(body.eqns) for v in body.outvars if _is_var(v)}

        def read(atom: Any) -> _Value:
            return env[atom] if _is_var(atom) else self.given(atom.val, "")

        for i, eqn in enumerate(body.eqns):
            operands = [read(atom) for atom in eqn.invars]
            for var, out in zip(eqn.outvars, self._evaluate(eqn, operands, place), strict=True):
                if last.get(var, -1) > i:
                    env[var] = out
            for atom in {v for v in eqn.invars if _is_var(v)}:
                if last[atom] == i:
                    del env[atom]
        return [read(atom) for atom in body.outvars]

    def _evaluate(self, eqn: Any, operands: list[_Value], place: _Place) -> list[_Value]:
        name = eqn.primitive.name
        if _BODIES.get(name) in eqn.params:
            body = compat.body_of(eqn.params[_BODIES[name]])
            called = eqn.params.get("name") or compat.function_name(body.jaxpr)
            inner = place.inside(eqn, f"{name}:{called}" if called else name)
            return self._entered(eqn, operands, self.run(body, operands, inner), place)
        if name == "cond":
            branch = int(operands[0].array)
            body = compat.body_of(eqn.params["branches"][branch])
            outs = self.run(body, operands[1:], place.inside(eqn, f"cond/{branch}"))
            return self._entered(eqn, operands, outs, place)
        outs = _bind(eqn, [operand.array for operand in operands])
        if name in ("scan", "while") and not all(map(_finite, outs)):
            loop = self._scan if name == "scan" else self._while
            return self._entered(eqn, operands, loop(eqn, operands, place), place)
        return self._entered(eqn, operands, [_Value(out) for out in outs], place)

    def _entered(
        self, eqn: Any, operands: list[_Value], outs: list[_Value], place: _Place
    ) -> list[_Value]:
        """Results of an equation, with the equation as the cause of what is not finite and has none."""
        view = eqn.primitive.name in _VIEWS
        node = None
        done = []
        for out in outs:
            if out.causes or _finite(out.array):
                done.append(out._replace(argument=operands[0].argument) if view else out)
                continue
            if node is None:
                node = self._node(eqn, operands, out.array, place)
            done.append(_Value(out.array, (node,)))
        read = [operand.argument for operand in operands if operand.argument]
        if read and not view:
            self._after = read[-1]
        return done

    def _node(self, eqn: Any, operands: list[_Value], out: Any, place: _Place) -> _Node:
        causes = [operand.causes for operand in operands]
        if eqn.primitive.name == "select_n":
            causes = _selected(operands)
        parents = tuple(dict.fromkeys(itertools.chain(*causes)))
        node = _Node(next(self._count), parents)
        turned = _has_nan(out) and not any(_has_nan(x.array) for x in operands if x.causes)
        read = any(parent.constant for parent in parents)
        if not parents or turned or read:
            rank = 0 if not parents else 1 if turned else 2
            node.made = _Made(eqn, operands, out, place, self._after, rank)
        return node

    def _scan(self, eqn: Any, operands: list[_Value], place: _Place) -> list[_Value]:
        params = eqn.params
        num_consts, num_carry = compat.scan_counts(params)
        consts, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]
        xs = operands[num_consts + num_carry :]
        once = self._iteration(params["jaxpr"], eqn, place)
        order = range(params["length"])
        stacked: list[list[_Value]] = []
        for i in reversed(order) if params["reverse"] else order:
            outs = once(i, [*consts, *carry, *(_at(x, i) for x in xs)])
            carry = outs[:num_carry]
            stacked.append(outs[num_carry:])
        if params["reverse"]:
            stacked.reverse()
        return [*carry, *map(_stacked, zip(*stacked, strict=True))]

    def _while(self, eqn: Any, operands: list[_Value], place: _Place) -> list[_Value]:
        params = eqn.params
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        cond_consts, body_consts = operands[: split[0]], operands[split[0] : split[1]]
        carry = operands[split[1] :]
        go_on = jax.jit(_function_of(params["cond_jaxpr"]))
        once = self._iteration(params["body_jaxpr"], eqn, place)
        for i in itertools.count():
            if not go_on(*(x.array for x in (*cond_consts, *carry)))[0]:
                return carry
            carry = once(i, [*body_consts, *carry])
        raise AssertionError("itertools.count does not end")

    def _iteration(
        self, jaxpr: Any, eqn: Any, place: _Place
    ) -> Callable[[int, list[_Value]], list[_Value]]:
        """One iteration of a loop: compiled, and entered where its results are not finite."""
        compiled = jax.jit(_function_of(jaxpr))
        body = compat.body_of(jaxpr)

        def once(i: int, args: list[_Value]) -> list[_Value]:
            outs = compiled(*(x.array for x in args))
            if all(map(_finite, outs)):
                return [_Value(out) for out in outs]
            return self.run(body, args, place.inside(eqn, f"{eqn.primitive.name}[{i}]"))

        return once

    def report(self, names: Sequence[str], results: Sequence[_Value]) -> NonFiniteReport:
        """Walks back from the results that are not finite."""
        reached: dict[_Node, list[str]] = {}
        bad = []
        for name, result in zip(names, results, strict=True):
            if not result.causes:
                continue
            bad.append(name)
            todo, seen = list(result.causes), set()
            while todo:
                node = todo.pop()
                if node not in seen:
                    seen.add(node)
                    reached.setdefault(node, []).append(name)
                    todo.extend(node.parents)
        nodes = sorted(reached, key=lambda node: node.order)
        arguments = tuple(dict.fromkeys(n.argument for n in nodes if n.argument))
        made = [(node, node.made) for node in nodes if node.made]
        if arguments:
            made = [pair for pair in made if pair[1].rank < 2]
        rank = min((m.rank for _, m in made), default=0)
        first = [pair for pair in made if pair[1].rank == rank]
        if bad and not arguments and (not made or rank == 2):
            arguments = ("a constant",)
        ops, seen = [], set()
        for node, m in first:
            if id(m.eqn) not in seen:  # the same operation in a later iteration says nothing new
                seen.add(id(m.eqn))
                ops.append(_describe(m, tuple(reached[node])))
        return NonFiniteReport(tuple(bad), arguments, tuple(ops))


def _named_arguments(
    fn: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[list[str], list[Any], Callable[[list[Any]], Any]]:
    """The leaves of the arguments with their names, and the function over such leaves."""
    try:
        parameters = inspect.signature(fn).parameters.values()
        plain = (
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        )
        words = list(itertools.islice(plain, len(args)))
    except (TypeError, ValueError):  # no signature
        words = []
    words += [f"args[{i}]" for i in range(len(words), len(args))]
    given, tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
    names = []
    for (_, first, *rest), _ in given:
        word = words[first.idx] if isinstance(first, jax.tree_util.SequenceKey) else first.key
        names.append("/".join(filter(None, (word, path_name(rest)))))

    def call(leaves: list[Any]) -> Any:
        args, kwargs = jax.tree.unflatten(tree, leaves)
        return fn(*args, **kwargs)

    return names, [leaf for _, leaf in given], call


_is_finite = jax.jit(all_finite)


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


def _is_var(atom: Any) -> bool:
    return not hasattr(atom, "val")


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(getattr(x, "dtype", np.result_type(type(x))), jnp.inexact)


def _finite(x: Any) -> bool:
    if not _inexact(x):
        return True
    if np.size(x) < 2**16:  # a copy to the host costs less than to compile for this shape
        return bool(np.isfinite(np.asarray(x)).all())
    return bool(_is_finite(x))


def _has_nan(x: Any) -> bool:
    return _inexact(x) and bool(np.isnan(np.asarray(x)).any())


def _selected(operands: list[_Value]) -> list[tuple[_Node, ...]]:
    """The causes of the cases that a select took something non-finite from."""
    which, *cases = operands
    chosen = np.asarray(which.array).astype(np.int32)
    taken = lambda n, case: (chosen == n) & ~np.isfinite(np.asarray(case.array))
    return [case.causes if taken(n, case).any() else () for n, case in enumerate(cases)]


def _at(x: _Value, i: int) -> _Value:
    array = x.array[i]
    return x._replace(array=array, causes=() if not x.causes or _finite(array) else x.causes)


def _stacked(slices: Sequence[_Value]) -> _Value:
    causes = dict.fromkeys(itertools.chain(*(x.causes for x in slices)))
    return _Value(jnp.stack([x.array for x in slices]), tuple(causes))


def _function_of(jaxpr: Any) -> Callable[..., list[Any]]:
    body = compat.body_of(jaxpr)
    return lambda *args: compat.eval_jaxpr(body.jaxpr, body.consts, *args)


def _bind(eqn: Any, arrays: Sequence[Any]) -> list[Any]:
    with compat.context_of(eqn):
        return compat.bind(eqn.primitive, arrays, eqn.params)


def _wider(dtype: Any) -> np.dtype:
    return np.dtype(np.float32 if jnp.finfo(dtype).bits < 32 else np.float64)


def _describe(made: _Made, reaches: tuple[str, ...]) -> NonFiniteOp:
    eqn, out, place = made.eqn, made.out, made.place
    wide = _in_wider(made)
    kind = "overflow" if wide is not None else "nan" if _has_nan(out) else "inf"
    stack = f"{place.stack}/{eqn.source_info.name_stack}"
    backward = "transpose(" in stack and "rematted_computation" not in stack
    operands = tuple(_range(x) for x in made.operands if is_floating(jnp.asarray(x.array).dtype))
    return NonFiniteOp(
        op=eqn.primitive.name,
        kind=kind,
        dtype=out.dtype.name,
        shape=tuple(out.shape),
        count=int((~np.isfinite(np.asarray(out))).sum()),
        backward=backward,
        module=_module(stack, operands, reaches if backward else (), made.after),
        path="/".join(place.path),
        source=compat.user_line(eqn),
        operands=operands,
        wide=wide,
        reaches=reaches,
    )


def _range(x: _Value) -> OperandRange:
    array = jnp.asarray(x.array)
    values = np.asarray(array, np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (np.nan, np.nan)
    infinities, nans = int(np.isinf(values).sum()), int(np.isnan(values).sum())
    return OperandRange(array.dtype.name, float(low), float(high), x.argument, infinities, nans)


def _module(
    stack: str, operands: Iterable[OperandRange], reaches: tuple[str, ...], after: str
) -> str:
    scope = []
    for word in re.sub(r"[\w<>]+\(|\)", "", stack).split("/"):
        ours = re.match(r"(with_precision|compute_in|autocast|held_in)\.", word)
        if word and not ours and word not in ("checkpoint", "rematted_computation", *scope[-1:]):
            scope.append(word)
    read = [o.argument for o in operands if o.argument]
    if scope:
        return "/".join(scope)
    if read:
        return read[-1]
    if len(reaches) == 1:
        return reaches[0]
    return f"after {after}" if after else ""


def _in_wider(made: _Made) -> float | None:
    """The largest magnitude of the result in a wider format; None where it is not finite there."""
    if not is_floating(made.out.dtype):
        return None
    wide = _wider(made.out.dtype)
    params = dict(made.eqn.params)
    if any(hasattr(p, "eqns") or hasattr(p, "jaxpr") for p in jax.tree.leaves(params)):
        return None
    for name in ("preferred_element_type", "new_dtype", "dtype"):
        if params.get(name) is not None and is_floating(params[name]):
            params[name] = wide
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x.array) for x in made.operands]
        arrays = [x.astype(wide) if is_floating(x.dtype) else x for x in arrays]
        try:
            out, *_ = compat.bind(made.eqn.primitive, arrays, params)
        # What a primitive raises for a dtype that it does not take is its own affair.
        except Exception:  # noqa: BLE001
            return None
        if out.dtype != wide or not bool(jnp.isfinite(out).all()):
            return None
        return float(jnp.abs(out).max())
