"""Split parameters are gathered where a function uses them, after their cast and inside its loops.

Left to itself, the compiler may as well split activations along the axis that a parameter is split by,
which moves far more. And a parameter that was gathered before the function would be whole, for as long
as the function runs, in the dtype that it is stored in.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jmp_train._jaxpr import compat
from jmp_train._jaxpr.bodies import bodies_of, construct_of
from jmp_train._jaxpr.compat import Body, Equation, Operand
from jmp_train._jaxpr.walk import walk
from jmp_train.sharding.shares import Share
from jmp_train.sharding.wide import USES, use
from jmp_train.types import Function, PyTree


def gathering(
    function: Function,
    specs_of: Callable[[PyTree], PyTree],
    mesh: Mesh,
    reduce_dtype: np.dtype | None = None,
) -> Function:
    """Return a function that gathers its first argument, parameters, where it uses them.

    A cast to a narrower dtype, a slice and a transposition come before the gather; so does the slice
    of stacked parameters that a step of a scan takes, and the gather is then part of that step. Inside
    `jax.checkpoint`, it is part of what is computed again. In the backward pass, the gradient of a
    gathered parameter is summed over the devices into their shares.

    Args:
      function: `function(params, *args, **kwargs)`.
      specs_of: returns the `PartitionSpec` of each parameter, in their structure.
      mesh: the mesh.
      reduce_dtype: dtype of the sums of gradients over the devices; None: that of the gradients, which
        is the dtype of the compute.

    >>> import jax.numpy as jnp
    >>> mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    >>> function = gathering(jnp.dot, lambda params: P("fsdp"), mesh)
    >>> float(jax.jit(function)(jnp.ones(3), jnp.ones(3)))
    3.0
    """
    if mesh.shape["fsdp"] == mesh.shape["tensor"] == 1 and reduce_dtype is None:
        return function

    @functools.wraps(function)
    def wrapped(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten(params)
        given, others = jax.tree.flatten((args, kwargs))
        out_trees: list[Any] = []

        def flat(*arrays: Any) -> Any:
            args, kwargs = jax.tree.unflatten(others, arrays[len(leaves) :])
            out = function(jax.tree.unflatten(tree, arrays[: len(leaves)]), *args, **kwargs)
            flat_out, out_tree = jax.tree.flatten(out)
            out_trees[:] = [out_tree]
            return flat_out

        closed = jax.make_jaxpr(flat)(*leaves, *given)
        specs = jax.tree.leaves(specs_of(params), is_leaf=lambda x: isinstance(x, P))
        shares = [Share.of(x, s, mesh, reduce_dtype) for x, s in zip(leaves, specs, strict=True)]
        found = _run(compat.body_of(closed), [*shares, *given])
        return jax.tree.unflatten(out_trees[0], [_used(x) for x in found])

    return wrapped


def _run(body: Body, values: Sequence[Any]) -> list[Any]:
    """Return the values of a body's outputs from those of its inputs, arrays and shares."""

    def equation(index: int, eqn: Equation, operands: list[Any]) -> Sequence[Any]:
        with compat.context_of(eqn):
            return _equation(eqn, operands)

    env = walk(body, values, equation, constant=lambda _, x: x, literal=lambda x: x.val)
    return env.read_all(body.outvars)


def _equation(eqn: Equation, operands: list[Any]) -> Sequence[Any]:
    shares = [i for i, x in enumerate(operands) if isinstance(x, Share)]
    if not shares:
        return compat.bind(eqn.primitive, operands, eqn.params)
    name, construct = eqn.primitive.name, construct_of(eqn)
    if construct is not None:
        enter = _BODIES.get(construct.name)
        if enter is not None:
            return enter(eqn, operands)
        return compat.bind(eqn.primitive, [_used(x) for x in operands], eqn.params)
    if name in _KEEPING and shares == [0] and (operands[0].used is None or name in _IN_ANY_SHARES):
        kept = _KEEPING[name](operands[0], operands[1:], eqn)
        if kept is not None:
            return [kept]
    if name in USES and len(shares) == 1:
        found = use(eqn, operands, shares[0])
        if found is not None:
            return [found]
    return compat.bind(eqn.primitive, [_used(x) for x in operands], eqn.params)


def _used(x: Any) -> Any:
    return x.gathered() if isinstance(x, Share) else x


def _array(x: Any) -> Any:
    return x.array if isinstance(x, Share) else x


# Bodies


def _inline(eqn: Equation, operands: list[Any]) -> Sequence[Any]:
    return _run(compat.body_of(bodies_of(eqn)[0]), operands)


def _remat(eqn: Equation, operands: list[Any]) -> Sequence[Any]:
    arrays = [_array(x) for x in operands]
    inside = _inside(eqn, operands, lambda share, array: share.like(array))
    closed = compat.trace(inside, [jax.typeof(x) for x in arrays], _name(eqn))
    jaxpr, consts = compat.open_jaxpr(closed)
    return compat.bind(eqn.primitive, [*consts, *arrays], {**eqn.params, "jaxpr": jaxpr})


def _scan(eqn: Equation, operands: list[Any]) -> Sequence[Any]:
    consts, carries = compat.scan_counts(eqn.params)
    body = compat.body_of(eqn.params["jaxpr"])
    inner, avals = [], []
    for i, (x, variable) in enumerate(zip(operands, body.invars, strict=True)):
        aval = variable.aval
        if isinstance(x, Share):
            if i < consts:  # gathered once, before the loop
                x = _cast_as_inside(x, body, variable).gathered()
                aval = jax.typeof(x)
            elif i < consts + carries or x.axes[0]:
                x = x.gathered()
            else:  # a step of the loop gets its part in the dtype that the parameter is stored in
                aval = compat.aval_like(aval, x.array.dtype)
        inner.append(x)
        avals.append(aval)
    inside = _inside(eqn, inner, lambda share, array: share.like(array, share.axes[1:]))
    closed = compat.trace(inside, avals, _name(eqn))
    return compat.bind(eqn.primitive, [_array(x) for x in inner], {**eqn.params, "jaxpr": closed})


_BODIES: dict[str, Callable[[Equation, list[Any]], Sequence[Any]]] = {
    "jit": _inline,
    "call": _inline,
    "remat": _remat,
    "scan": _scan,
}


def _inside(
    eqn: Equation, operands: Sequence[Any], part: Callable[[Share, Operand], Any]
) -> Function:
    """Return the body of an equation as a function of arrays, that gathers its shares.

    Args:
      eqn: the equation.
      operands: what the body is called with.
      part: returns what the body gets of a share.
    """
    body = compat.body_of(bodies_of(eqn)[0])

    def inside(*arrays: Any) -> Any:
        values = []
        for x, array, variable in zip(operands, arrays, body.invars, strict=True):
            if isinstance(x, Share):
                values.append(part(x, array))
            else:  # a cast that was taken out of a loop is undone
                dtype = variable.aval.dtype
                values.append(array if array.dtype == dtype else array.astype(dtype))
        return [_used(x) for x in _run(body, values)]

    return inside


def _name(eqn: Equation) -> str:
    return compat.function_name(bodies_of(eqn)[0])


def _cast_as_inside(share: Share, body: Body, variable: Any) -> Share:
    """Return a share in the narrower dtype that a body casts it to, if it does nothing else with it."""
    dtypes = set(_casts_of(body, variable))
    if len(dtypes) != 1 or None in dtypes:
        return share
    (dtype,) = dtypes
    return share.cast(dtype) or share


def _casts_of(body: Body, variable: Any) -> Iterator[Any]:
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
            elif construct is not None and construct.runs_once and construct.name in _BODIES:
                inner = compat.body_of(bodies_of(eqn)[0])
                yield from _casts_of(inner, inner.invars[i])
            else:
                yield None


# What leaves a share a share


def _cast(share: Share, rest: list[Any], eqn: Equation) -> Share | None:
    return share.cast(eqn.params["new_dtype"])


def _slice(share: Share, rest: list[Any], eqn: Equation) -> Share | None:
    """Return a slice, if it takes the split axes whole."""
    sizes = zip(eqn.outvars[0].aval.shape, share.array.shape, strict=True)
    if any(a != b and names for (a, b), names in zip(sizes, share.axes, strict=True)):
        return None
    return share.like(_bound(share, rest, eqn))


def _squeeze(share: Share, rest: list[Any], eqn: Equation) -> Share | None:
    dropped = {d % share.array.ndim for d in eqn.params["dimensions"]}
    if any(share.axes[d] for d in dropped):
        return None
    axes = [names for i, names in enumerate(share.axes) if i not in dropped]
    return share.like(_bound(share, rest, eqn), axes)


def _transpose(share: Share, rest: list[Any], eqn: Equation) -> Share | None:
    axes = [share.axes[i] for i in eqn.params["permutation"]]
    return share.like(_bound(share, rest, eqn), axes)


def _reshape(share: Share, rest: list[Any], eqn: Equation) -> Share | None:
    """Return a parameter with more or fewer axes, if each axis that is split remains one."""
    shape = tuple(eqn.outvars[0].aval.shape)
    before = [math.prod(share.array.shape[:i]) for i in range(share.array.ndim)]
    starts = [math.prod(shape[:i]) for i in range(len(shape))]
    axes: list[tuple[str, ...]] = [() for _ in shape]
    for size, start, names in zip(share.array.shape, before, share.axes, strict=True):
        same = [i for i, n in enumerate(shape) if (n, starts[i]) == (size, start)]
        if names and (size == 1 or not same):
            return None
        if names:
            axes[same[0]] = names
    return share.like(share.array.reshape(shape), axes)


def _broadcast(share: Share, rest: list[Any], eqn: Equation) -> Share | None:
    """Return a parameter with more axes of size 1, as it is added to a batch."""
    same = math.prod(eqn.outvars[0].aval.shape) == math.prod(share.array.shape)
    return _reshape(share, rest, eqn) if same else None


def _use(share: Share, rest: list[Any], eqn: Equation) -> Share | None:
    """Return a parameter that is used in other shares of the axis `tensor`."""
    spec = getattr(eqn.params["sharding"], "spec", None)
    if spec is None or eqn.params["unconstrained_dims"]:
        return None
    names = [(n,) if isinstance(n, str) else tuple(n or ()) for n in spec]
    if not {n for own in names for n in own} <= {"tensor"}:
        return None
    return share.used_by([*names, *[()] * (share.array.ndim - len(names))])


def _bound(share: Share, rest: list[Any], eqn: Equation) -> Any:
    return compat.bind(eqn.primitive, [share.array, *rest], eqn.params)[0]


_KEEPING: dict[str, Callable[[Share, list[Any], Equation], Share | None]] = {
    "convert_element_type": _cast,
    "slice": _slice,
    "dynamic_slice": _slice,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "sharding_constraint": _use,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
_IN_ANY_SHARES = ("convert_element_type", "sharding_constraint")
