"""Evaluates a jaxpr with another meaning for its operations, entering every construct.

The evaluation is either traced, with the loops of `jax.lax`, or step by step on concrete arrays, so
that each iteration of a loop can be observed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.extend.core import Literal

from jmp_train._jaxpr import compat
from jmp_train._jaxpr.bodies import bodies_of, body_names, construct_of
from jmp_train._jaxpr.compat import Body, Equation, Operand
from jmp_train._jaxpr.equations import Place
from jmp_train._jaxpr.walk import walk

TOP = Place()

#: Primitives that run one body on all their operands, beside those of `bodies.CONSTRUCTS`: autocast
#: leaves these as they were written, an evaluation enters them.
_CALLS = ("composite", "custom_vmap_call", "linear_call")


class Interpreter:
    """Evaluates bodies. A sampler is one operation; step by step, so is `shard_map`.

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
        loops = (
            {"cond": self._branch, "scan": self._scan_steps, "while": self._while_steps}
            if stepwise
            else {"cond": self._switch, "scan": self._scan, "while": self._while}
        )
        self._enter = loops if stepwise else {**loops, "shard_map": self.shard_map}

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
        if _is_sampler(eqn):
            return self._operation(eqn, operands, place)
        if construct and construct.runs_once:
            (body,), (name,) = bodies_of(eqn), body_names(eqn)
            return self.run(compat.body_of(body), operands, place.inside(eqn, name))
        if construct and construct.name in self._enter:
            return self._enter[construct.name](eqn, operands, place)
        if eqn.primitive.name in _CALLS:
            return self._call(eqn, operands, place)
        if eqn.primitive.name == "custom_linear_solve":
            return self._solve(eqn, operands, place)
        return self._operation(eqn, operands, place)

    def _call(self, eqn: Equation, operands: list[Operand], place: Place) -> list[Operand]:
        name = eqn.primitive.name
        inner = f"{name}:{eqn.params['name']}" if name == "composite" else name
        body = compat.called_body(eqn)
        return self.run(body, operands, place.inside(eqn, inner))

    def _solve(self, eqn: Equation, operands: list[Operand], place: Place) -> list[Operand]:
        """Solve a linear system: the operands are constants of four functions, then right-hand sides."""
        lengths, solve = eqn.params["const_lengths"], eqn.params["jaxprs"].solve
        start = lengths.matvec + lengths.vecmat
        constants = operands[start : start + lengths.solve]
        inner = place.inside(eqn, eqn.primitive.name)
        return self.run(compat.body_of(solve), [*constants, *operands[sum(lengths) :]], inner)

    def shard_map(self, eqn: Equation, operands: list[Operand], place: Place) -> list[Operand]:
        """Evaluate a `shard_map` on its devices."""
        body, params = self._body(eqn, 0, place), eqn.params
        run = jax.shard_map(
            lambda *parts: tuple(body(*parts)),
            mesh=params["mesh"],
            in_specs=params["in_specs"],
            out_specs=params["out_specs"],
            axis_names=frozenset(params["newly_manual_axes"]),
            check_vma=params["check_vma"],
        )
        return list(run(*operands))

    def _body(self, eqn: Equation, n: int, place: Place) -> Callable[..., list[Operand]]:
        body = compat.body_of(bodies_of(eqn)[n])
        inner = place.inside(eqn, body_names(eqn)[n])
        return lambda *operands: self.run(body, operands, inner)

    def _branch(self, eqn: Equation, operands: list[Operand], place: Place) -> list[Operand]:
        return self._body(eqn, int(operands[0]), place)(*operands[1:])

    def _switch(self, eqn: Equation, operands: list[Operand], place: Place) -> list[Operand]:
        branches = [self._body(eqn, n, place) for n in range(len(bodies_of(eqn)))]
        platforms = eqn.params.get("branches_platforms")
        if platforms is None:
            return jax.lax.switch(operands[0], branches, *operands[1:])
        # A branch of `platform_dependent` may not lower for another platform.
        pairs = list(zip(platforms, branches, strict=True))
        default = next((branch for names, branch in pairs if names is None), None)
        named = {name: branch for names, branch in pairs for name in names or ()}
        return jax.lax.platform_dependent(*operands[1:], default=default, **named)

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
            return [*carry, *(self._given(jax.lax.empty(a.shape, a.dtype)) for a in empty)]
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
        continues, once, carry = self._while_parts(eqn, operands, place)
        return jax.lax.while_loop(
            lambda carry: jax.numpy.any(continues(carry)),
            lambda carry: _where_continuing(continues(carry), once(carry), carry),
            carry,
        )

    def _while_steps(self, eqn: Equation, operands: list[Operand], place: Place) -> list[Operand]:
        continues, once, carry = self._while_parts(eqn, operands, place)
        while np.any(condition := continues(carry)):
            carry = _where_continuing(condition, once(carry), carry)
        return carry


def _is_sampler(eqn: Equation) -> bool:
    """Return whether an equation calls a jitted sampler of `jax.random`, of keys and numbers in the code.

    One that takes floating results, such as a scale that was computed, calculates with them: it is
    entered, and calls such a sampler itself.
    """
    construct = construct_of(eqn)
    if construct is None or construct.name != "jit" or not compat.is_called_by_jax_random(eqn):
        return False
    computed = (v.aval.dtype for v in eqn.invars if not isinstance(v, Literal))
    return not any(jax.numpy.issubdtype(dtype, np.inexact) for dtype in computed)


def _where_continuing(condition: Operand, new: list[Operand], old: list[Operand]) -> list[Operand]:
    """Return the carries of a loop; the condition of a loop under `vmap` has one value a row."""
    if not condition.ndim:
        return new
    rows = tuple(range(condition.ndim))
    return [
        jax.lax.select(jax.lax.broadcast_in_dim(condition, x.shape, rows), x, y)
        for x, y in zip(new, old, strict=True)
    ]
