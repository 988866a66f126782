"""Replays a computation operation by operation, and finds what its infinities and NaNs come from.

What led to a non-finite result is found backwards from it, through non-finite values alone, so the
-inf of an attention mask, which softmax turned into zeros, is never named.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train._jaxpr import compat
from jmp_train._jaxpr.bodies import bodies_of, body_names, construct_of
from jmp_train._jaxpr.compat import Equation, Jaxpr, Operand
from jmp_train._jaxpr.interpret import Place
from jmp_train._jaxpr.walk import walk
from jmp_train.debug.description import describe
from jmp_train.debug.report import NonFiniteReport
from jmp_train.debug.values import (
    Cause,
    Origin,
    ReplayedValue,
    has_nan,
    is_finite,
    is_inexact,
)

# Operations that return an argument in another shape or dtype.
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


class Replay:
    """Evaluates a jaxpr, and stores the causes of what is not finite."""

    def __init__(self) -> None:
        self._count = itertools.count()
        self._after = ""

    def given(self, array: Operand, name: str) -> ReplayedValue:
        """Return the value of an argument (with a name) or a constant.

        The names of integers and scalars are dropped: they tell no place in a model.
        """
        if is_finite(array):
            return ReplayedValue(array, (), name if is_inexact(array) and np.ndim(array) else "")
        node = Cause(next(self._count))
        node.argument, node.constant = name, not name
        return ReplayedValue(array, (node,), name)

    def run(
        self, body: compat.Body, args: Sequence[ReplayedValue], place: Place
    ) -> list[ReplayedValue]:
        """Return the results of a body; arrays are dropped after their last use."""
        env = walk(
            body,
            args,
            lambda _, eqn, operands: self._evaluate(eqn, operands, place),
            constant=lambda _, array: self.given(array, ""),
            literal=lambda literal: self.given(literal.val, ""),
        )
        return env.read_all(body.outvars)

    def _evaluate(
        self, eqn: Equation, operands: list[ReplayedValue], place: Place
    ) -> list[ReplayedValue]:
        construct = construct_of(eqn)
        name = construct.name if construct else ""
        if construct and construct.runs_once:
            (body,), (path,) = bodies_of(eqn), body_names(eqn)
            outs = self.run(compat.body_of(body), operands, place.inside(eqn, path))
            return self._caused(eqn, operands, outs, place)
        if name == "cond":
            branch = int(operands[0].array)
            body = compat.body_of(bodies_of(eqn)[branch])
            inner = place.inside(eqn, body_names(eqn)[branch])
            return self._caused(eqn, operands, self.run(body, operands[1:], inner), place)
        outs = _bind(eqn, [operand.array for operand in operands])
        if name in ("scan", "while") and not all(map(is_finite, outs)):
            loop = self._scan if name == "scan" else self._while
            return self._caused(eqn, operands, loop(eqn, operands, place), place)
        return self._caused(eqn, operands, [ReplayedValue(out) for out in outs], place)

    def _caused(
        self, eqn: Equation, operands: list[ReplayedValue], outs: list[ReplayedValue], place: Place
    ) -> list[ReplayedValue]:
        """Return the results of an equation: the cause of non-finite values that have none."""
        view = eqn.primitive.name in _VIEWS
        node = None
        done = []
        for out in outs:
            if out.causes or is_finite(out.array):
                done.append(out._replace(argument=operands[0].argument) if view else out)
                continue
            if node is None:
                node = self._node(eqn, operands, out.array, place)
            done.append(ReplayedValue(out.array, (node,)))
        read = [operand.argument for operand in operands if operand.argument]
        if read and not view:
            self._after = read[-1]
        return done

    def _node(
        self, eqn: Equation, operands: list[ReplayedValue], out: Operand, place: Place
    ) -> Cause:
        causes = [operand.causes for operand in operands]
        if eqn.primitive.name == "select_n":
            causes = _selected(operands)
        parents = tuple(dict.fromkeys(itertools.chain(*causes)))
        node = Cause(next(self._count), parents)
        turned = has_nan(out) and not any(has_nan(x.array) for x in operands if x.causes)
        read = any(parent.constant for parent in parents)
        if not parents or turned or read:
            rank = 0 if not parents else 1 if turned else 2
            node.origin = Origin(eqn, operands, out, place, self._after, rank)
        return node

    def _scan(
        self, eqn: Equation, operands: list[ReplayedValue], place: Place
    ) -> list[ReplayedValue]:
        params = eqn.params
        num_consts, num_carry = compat.scan_counts(params)
        consts, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]
        xs = operands[num_consts + num_carry :]
        once = self._iteration(params["jaxpr"], eqn, place)
        order = range(params["length"])
        stacked: list[list[ReplayedValue]] = []
        for i in reversed(order) if params["reverse"] else order:
            outs = once(i, [*consts, *carry, *(_at(x, i) for x in xs)])
            carry = outs[:num_carry]
            stacked.append(outs[num_carry:])
        if params["reverse"]:
            stacked.reverse()
        return [*carry, *map(_stacked, zip(*stacked, strict=True))]

    def _while(
        self, eqn: Equation, operands: list[ReplayedValue], place: Place
    ) -> list[ReplayedValue]:
        params = eqn.params
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        cond_consts, body_consts = operands[: split[0]], operands[split[0] : split[1]]
        carry = operands[split[1] :]
        continues = jax.jit(_function_of(params["cond_jaxpr"]))
        once = self._iteration(params["body_jaxpr"], eqn, place)
        for i in itertools.count():
            if not continues(*(x.array for x in (*cond_consts, *carry)))[0]:
                return carry
            carry = once(i, [*body_consts, *carry])
        raise AssertionError("itertools.count does not end")

    def _iteration(
        self, jaxpr: Jaxpr, eqn: Equation, place: Place
    ) -> Callable[[int, list[ReplayedValue]], list[ReplayedValue]]:
        """Return one iteration of a loop: compiled, and entered where a result is not finite."""
        compiled = jax.jit(_function_of(jaxpr))
        body = compat.body_of(jaxpr)

        def once(i: int, args: list[ReplayedValue]) -> list[ReplayedValue]:
            outs = compiled(*(x.array for x in args))
            if all(map(is_finite, outs)):
                return [ReplayedValue(out) for out in outs]
            return self.run(body, args, place.inside(eqn, f"{eqn.primitive.name}[{i}]"))

        return once

    def report(self, names: Sequence[str], results: Sequence[ReplayedValue]) -> NonFiniteReport:
        """Walk back from the results that are not finite."""
        reached: dict[Cause, list[str]] = {}
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
        made = [(node, node.origin) for node in nodes if node.origin]
        if arguments:
            made = [pair for pair in made if pair[1].rank < 2]
        rank = min((m.rank for _, m in made), default=0)
        first = [pair for pair in made if pair[1].rank == rank]
        if bad and not arguments and (not made or rank == 2):
            arguments = ("a constant",)
        ops, seen = [], set()
        for node, m in first:
            if id(m.eqn) not in seen:  # the same operation in a later iteration adds nothing
                seen.add(id(m.eqn))
                ops.append(describe(m, tuple(reached[node])))
        return NonFiniteReport(tuple(bad), arguments, tuple(ops))


def _selected(operands: list[ReplayedValue]) -> list[tuple[Cause, ...]]:
    """Return the causes of the cases that a select took non-finite values from."""
    which, *cases = operands
    chosen = np.asarray(which.array).astype(np.int32)
    taken = lambda n, case: (chosen == n) & ~np.isfinite(np.asarray(case.array))
    return [case.causes if taken(n, case).any() else () for n, case in enumerate(cases)]


def _at(x: ReplayedValue, i: int) -> ReplayedValue:
    array = x.array[i]
    return x._replace(array=array, causes=() if not x.causes or is_finite(array) else x.causes)


def _stacked(slices: Sequence[ReplayedValue]) -> ReplayedValue:
    causes = dict.fromkeys(itertools.chain(*(x.causes for x in slices)))
    return ReplayedValue(jnp.stack([x.array for x in slices]), tuple(causes))


def _function_of(jaxpr: Jaxpr) -> Callable[..., list[Operand]]:
    body = compat.body_of(jaxpr)
    return lambda *args: compat.eval_jaxpr(body.jaxpr, body.consts, *args)


def _bind(eqn: Equation, arrays: Sequence[Operand]) -> list[Operand]:
    with compat.context_of(eqn):
        return compat.bind(eqn.primitive, arrays, eqn.params)
