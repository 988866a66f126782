"""Evaluates a jaxpr with another meaning for its operations, entering every construct.

The evaluation is either traced, with the loops of `jax.lax`, or step by step on concrete arrays, so
that each iteration of a loop can be observed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jmp_train._jaxpr import compat
from jmp_train._jaxpr.bodies import bodies_of, body_names, construct_of
from jmp_train._jaxpr.compat import Body, Equation, Operand
from jmp_train._jaxpr.equations import Place
from jmp_train._jaxpr.walk import walk

TOP = Place()


class Interpreter:
    """Evaluates bodies. `shard_map` is evaluated as one operation.

    Args:
      operation: `operation(eqn, operands, place) -> results` of an equation without a body to enter.
      given: makes the operand of a constant or a literal, from a NumPy or JAX array.
      stepwise: whether loops run iteration by iteration, on concrete arrays.
    """

    def __init__(
        self,
        operation: Callable[[Equation, list[Operand], Place], Sequence[Operand]],
        given: Callable[[Operand], Operand],
        *,
        stepwise: bool,
    ):
        self._operation = operation
        self._given = given
        self._enter = (
            {"cond": self._branch, "scan": self._scan_steps, "while": self._while_steps}
            if stepwise
            else {"cond": self._switch, "scan": self._scan, "while": self._while}
        )

    def run(self, body: Body, args: Sequence[Operand], place: Place = TOP) -> list[Operand]:
        """Return the results of a body."""
        env = walk(
            body,
            args,
            lambda _, eqn, operands: self._evaluate(eqn, operands, place),
            constant=lambda _, array: self._given(array),
            literal=lambda literal: self._given(np.asarray(literal.val, literal.aval.dtype)),
        )
        return env.read_all(body.outvars)

    def _evaluate(self, eqn: Equation, operands: list[Operand], place: Place) -> Sequence[Operand]:
        construct = construct_of(eqn)
        if construct and construct.runs_once:
            (body,), (name,) = bodies_of(eqn), body_names(eqn)
            return self.run(compat.body_of(body), operands, place.inside(eqn, name))
        if construct and construct.name in self._enter:
            return self._enter[construct.name](eqn, operands, place)
        return self._operation(eqn, operands, place)

    def _body(self, eqn: Equation, n: int, place: Place) -> Callable[..., list[Operand]]:
        body = compat.body_of(bodies_of(eqn)[n])
        inner = place.inside(eqn, body_names(eqn)[n])
        return lambda *operands: self.run(body, operands, inner)

    def _branch(self, eqn: Equation, operands: list[Operand], place: Place) -> list[Operand]:
        return self._body(eqn, int(operands[0]), place)(*operands[1:])

    def _switch(self, eqn: Equation, operands: list[Operand], place: Place) -> list[Operand]:
        branches = [self._body(eqn, n, place) for n in range(len(bodies_of(eqn)))]
        return jax.lax.switch(operands[0], branches, *operands[1:])

    def _scan_parts(
        self, eqn: Equation, operands: list[Operand]
    ) -> tuple[list[Operand], list[Operand], list[Operand]]:
        consts, carries = compat.scan_counts(eqn.params)
        split = consts + carries
        return operands[:consts], operands[consts:split], operands[split:]

    def _scan(self, eqn: Equation, operands: list[Operand], place: Place) -> list[Operand]:
        consts, carry, xs = self._scan_parts(eqn, operands)
        body = self._body(eqn, 0, place)

        def once(carry: list[Operand], xs: list[Operand]) -> tuple[list[Operand], list[Operand]]:
            outs = body(*consts, *carry, *xs)
            return outs[: len(carry)], outs[len(carry) :]

        options = {name: eqn.params[name] for name in ("length", "reverse")}
        carry, ys = jax.lax.scan(once, carry, xs, **options)
        return [*carry, *ys]

    def _scan_steps(self, eqn: Equation, operands: list[Operand], place: Place) -> list[Operand]:
        consts, carry, xs = self._scan_parts(eqn, operands)
        body = self._body(eqn, 0, place)
        order = list(range(eqn.params["length"]))
        ys: list[list[Operand]] = []
        for i in reversed(order) if eqn.params["reverse"] else order:
            outs = body(*consts, *carry, *(x[i] for x in xs))
            carry = outs[: len(carry)]
            ys.append(outs[len(carry) :])
        if not ys:  # no iteration: the stacked results have no element
            empty = [v.aval for v in eqn.outvars[len(carry) :]]
            return [*carry, *(self._given(np.zeros(a.shape, a.dtype)) for a in empty)]
        if eqn.params["reverse"]:
            ys.reverse()
        return [*carry, *(jax.numpy.stack(y) for y in zip(*ys, strict=True))]

    def _while_parts(
        self, eqn: Equation, operands: list[Operand], place: Place
    ) -> tuple[Callable[..., Operand], Callable[..., list[Operand]], list[Operand]]:
        split = eqn.params["cond_nconsts"]
        end = split + eqn.params["body_nconsts"]
        cond, body = self._body(eqn, 0, place), self._body(eqn, 1, place)
        continues = lambda carry: cond(*operands[:split], *carry)[0]
        once = lambda carry: body(*operands[split:end], *carry)
        return continues, once, operands[end:]

    def _while(self, eqn: Equation, operands: list[Operand], place: Place) -> list[Operand]:
        return jax.lax.while_loop(*self._while_parts(eqn, operands, place))

    def _while_steps(self, eqn: Equation, operands: list[Operand], place: Place) -> list[Operand]:
        continues, once, carry = self._while_parts(eqn, operands, place)
        while continues(carry):
            carry = once(carry)
        return carry
