"""Split parameters are gathered where a function uses them, after their cast and inside its loops.

Left to itself, the compiler may as well split activations along the axis that a parameter is split by,
which moves far more. And a parameter that was gathered before the function would be whole, for as long
as the function runs, in the dtype that it is stored in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmp_train._jaxpr import compat
from jmp_train._jaxpr.bodies import bodies_of, construct_of
from jmp_train._jaxpr.compat import Body, Equation
from jmp_train._jaxpr.walk import walk
from jmp_train.types import Function, PyTree

_GATHERED = (
    "fsdp"  # the axis whose shares are gathered; products are computed in shares of `tensor`
)


def gathering(function: Function, specs_of: Callable[[PyTree], PyTree], mesh: Mesh) -> Function:
    """Return a function that gathers its first argument, parameters, where it uses them.

    A cast to a narrower dtype, a slice and a transposition come before the gather; so does the slice
    of stacked parameters that a step of a scan takes, and the gather is then part of that step. Inside
    `jax.checkpoint`, it is part of what is computed again. In the backward pass, the gradient of a
    gathered parameter is summed over the devices into their shares.

    Args:
      function: `function(params, *args, **kwargs)`.
      specs_of: returns the `PartitionSpec` of each parameter, in their structure.
      mesh: the mesh.

    >>> import jax.numpy as jnp
    >>> mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    >>> function = gathering(jnp.dot, lambda params: P("fsdp"), mesh)
    >>> float(jax.jit(function)(jnp.ones(3), jnp.ones(3)))
    3.0
    """
    if mesh.shape[_GATHERED] == 1:
        return function

    @functools.wraps(function)
    def wrapped(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten(params)
        given, others = jax.tree.flatten((args, kwargs))
        outs: list[Any] = []

        def flat(*arrays: Any) -> Any:
            args, kwargs = jax.tree.unflatten(others, arrays[len(leaves) :])
            out = function(jax.tree.unflatten(tree, arrays[: len(leaves)]), *args, **kwargs)
            flat_out, out_tree = jax.tree.flatten(out)
            outs[:] = [out_tree]
            return flat_out

        closed = jax.make_jaxpr(flat)(*leaves, *given)
        specs = jax.tree.leaves(specs_of(params), is_leaf=lambda x: isinstance(x, P))
        split = [_Split.of(x, s, mesh) for x, s in zip(leaves, specs, strict=True)]
        found = _Gatherer().run(compat.body_of(closed), [*split, *given])
        return jax.tree.unflatten(outs[0], [_used(x) for x in found])

    return wrapped


class _Split:
    """A parameter, or a part of one, that is not gathered yet.

    Args:
      array: its values, whose shares lie on the devices.
      axes: the mesh axes that each of its axes is split by.
      mesh: the mesh.
    """

    def __init__(self, array: Any, axes: tuple[tuple[str, ...], ...], mesh: Mesh):
        self.array, self.axes, self._mesh = array, axes, mesh
        self._used: Any = None

    @classmethod
    def of(cls, array: Any, spec: P, mesh: Mesh) -> Any:
        """Return a parameter by its spec; one that is not split, as it is."""
        names = [(n,) if isinstance(n, str) else tuple(n or ()) for n in spec]
        axes = (*names, *[()] * (array.ndim - len(names)))
        return cls(array, axes, mesh) if any(_GATHERED in names for names in axes) else array

    def like(self, array: Any, axes: Sequence[tuple[str, ...]]) -> Any:
        """Return a part of this one; once nothing of it is split, its array."""
        if not any(_GATHERED in names for names in axes):
            return array
        return _Split(array, tuple(axes), self._mesh)

    def is_split(self, axis: int) -> bool:
        """Return whether an axis is split at all."""
        return bool(self.axes[axis])

    def sharding(self, *, gathered: bool) -> NamedSharding:
        left = [[n for n in names if not (gathered and n == _GATHERED)] for names in self.axes]
        return NamedSharding(self._mesh, P(*(tuple(names) or None for names in left)))

    def use(self) -> Any:
        """Return the gathered values."""
        if self._used is None:
            share, whole = self.sharding(gathered=False), self.sharding(gathered=True)
            self._used = _gather(self.array, share, whole)
        return self._used


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, share: NamedSharding, whole: NamedSharding) -> jax.Array:
    x = jax.lax.with_sharding_constraint(x, share)  # so that a cast comes before
    return jax.lax.with_sharding_constraint(x, whole)


def _gather_forward(x: jax.Array, share: NamedSharding, whole: NamedSharding) -> Any:
    return _gather(x, share, whole), None


def _gather_backward(share: NamedSharding, whole: NamedSharding, _: None, g: jax.Array) -> Any:
    del whole
    return (jax.lax.with_sharding_constraint(g, share),)


_gather.defvjp(_gather_forward, _gather_backward)


def _used(x: Any) -> Any:
    return x.use() if isinstance(x, _Split) else x


class _Gatherer:
    """Runs a jaxpr on arrays and split parameters."""

    def run(self, body: Body, values: Sequence[Any]) -> list[Any]:
        """Return the values of a body's outputs from those of its inputs."""

        def equation(index: int, eqn: Equation, operands: list[Any]) -> Sequence[Any]:
            with compat.context_of(eqn):
                return self._equation(eqn, operands)

        env = walk(body, values, equation, constant=lambda _, x: x, literal=lambda x: x.val)
        return env.read_all(body.outvars)

    def _equation(self, eqn: Equation, operands: list[Any]) -> Sequence[Any]:
        if not any(isinstance(x, _Split) for x in operands):
            return compat.bind(eqn.primitive, operands, eqn.params)
        construct = construct_of(eqn)
        if construct is not None:
            enter = getattr(self, f"_{construct.name}", None)
            if enter is not None:
                return enter(eqn, operands)
            return compat.bind(eqn.primitive, [_used(x) for x in operands], eqn.params)
        keep = _KEEPING.get(eqn.primitive.name)
        axes = None if keep is None else keep(operands[0], eqn)
        if axes is None:
            return compat.bind(eqn.primitive, [_used(x) for x in operands], eqn.params)
        first, *rest = operands
        (out,) = compat.bind(eqn.primitive, [first.array, *rest], eqn.params)
        return [first.like(out, axes)]

    def _jit(self, eqn: Equation, operands: list[Any]) -> Sequence[Any]:
        return self.run(compat.body_of(eqn.params["jaxpr"]), operands)

    def _call(self, eqn: Equation, operands: list[Any]) -> Sequence[Any]:
        return self.run(compat.body_of(eqn.params["call_jaxpr"]), operands)

    def _remat(self, eqn: Equation, operands: list[Any]) -> Sequence[Any]:
        arrays = [x.array if isinstance(x, _Split) else x for x in operands]
        closed = self._traced(eqn.params["jaxpr"], operands, [jax.typeof(x) for x in arrays])
        jaxpr, consts = compat.open_jaxpr(closed)
        params = {**eqn.params, "jaxpr": jaxpr}
        return compat.bind(eqn.primitive, [*consts, *arrays], params)

    def _scan(self, eqn: Equation, operands: list[Any]) -> Sequence[Any]:
        consts, carries = compat.scan_counts(eqn.params)
        body = compat.body_of(eqn.params["jaxpr"])
        inner = []
        for i, (x, variable) in enumerate(zip(operands, body.invars, strict=True)):
            if i < consts:  # gathered once, before the loop
                x = _used(_cast_as_inside(x, body, variable))
            elif i < consts + carries or (isinstance(x, _Split) and x.is_split(0)):
                x = _used(x)
            inner.append(x)
        arrays = [x.array if isinstance(x, _Split) else x for x in inner]
        avals = [
            v.aval if i >= consts else jax.typeof(x)
            for i, (v, x) in enumerate(zip(body.invars, arrays, strict=True))
        ]
        closed = self._traced(eqn.params["jaxpr"], inner, avals, drop=1)
        return compat.bind(eqn.primitive, arrays, {**eqn.params, "jaxpr": closed})

    def _traced(self, jaxpr: Any, operands: Sequence[Any], avals: Any, drop: int = 0) -> Any:
        """Return the closed jaxpr of a body that gathers its split operands.

        Args:
          jaxpr: the body.
          operands: what it is called with; the split ones lose so many leading axes as `drop` says.
          avals: types of its inputs.
          drop: see above.
        """
        body = compat.body_of(jaxpr)

        def inside(*arrays: Any) -> Any:
            values = [
                x.like(array, x.axes[drop:])
                if isinstance(x, _Split)
                else array.astype(v.aval.dtype)
                if array.dtype != v.aval.dtype
                else array
                for x, array, v in zip(operands, arrays, body.invars, strict=True)
            ]
            return [_used(x) for x in self.run(body, values)]

        return compat.trace(inside, list(avals), compat.function_name(jaxpr))


def _cast_as_inside(x: Any, body: Body, variable: Any) -> Any:
    """Return a split operand in the narrower dtype that a body casts it to, if it does nothing else."""
    if not isinstance(x, _Split):
        return x
    dtypes = set(_cast_to(body, variable))
    if len(dtypes) != 1 or None in dtypes:
        return x
    (dtype,) = dtypes
    narrower = dtype.itemsize < x.array.dtype.itemsize
    return x.like(x.array.astype(dtype), x.axes) if narrower else x


def _cast_to(body: Body, variable: Any) -> Iterator[Any]:
    """Yield the dtype of each cast of a variable of a body; None for any other use."""
    if any(v is variable for v in body.outvars):
        yield None
    for eqn in body.eqns:
        for i, v in enumerate(eqn.invars):
            if v is not variable:
                continue
            construct = construct_of(eqn)
            if eqn.primitive.name == "convert_element_type":
                yield eqn.params["new_dtype"]
            elif construct is not None and construct.name in ("jit", "remat", "call"):
                inner = compat.body_of(bodies_of(eqn)[0])
                yield from _cast_to(inner, inner.invars[i])
            else:
                yield None


def _cast(x: Any, eqn: Equation) -> Any:
    if not isinstance(x, _Split):
        return None
    wider = eqn.params["new_dtype"].itemsize > x.array.dtype.itemsize
    return None if wider else x.axes


def _slice(x: Any, eqn: Equation) -> Any:
    """Return the axes of a slice, if it takes the split axes whole."""
    if not isinstance(x, _Split):
        return None
    sizes = eqn.outvars[0].aval.shape
    whole = [a == b for a, b in zip(sizes, x.array.shape, strict=True)]
    return x.axes if all(w or not x.is_split(i) for i, w in enumerate(whole)) else None


def _squeeze(x: Any, eqn: Equation) -> Any:
    dropped = {d % x.array.ndim for d in eqn.params["dimensions"]}
    return tuple(names for i, names in enumerate(x.axes) if i not in dropped)


def _transpose(x: Any, eqn: Equation) -> Any:
    return tuple(x.axes[i] for i in eqn.params["permutation"])


#: By primitive: returns the mesh axes of each axis of the result, whose first operand is split; None
#: where it has to be gathered before.
_KEEPING: dict[str, Callable[[Any, Equation], Any]] = {
    "convert_element_type": _cast,
    "slice": _slice,
    "dynamic_slice": _slice,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "copy": lambda x, eqn: x.axes,
}
