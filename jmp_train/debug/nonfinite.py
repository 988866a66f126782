"""Finds the operations of a computation that went non-finite first, by a replay.

A skipped step has changed nothing, so it can be computed again, slowly: each operation by itself,
its result checked, and every infinity or NaN traced to the operations that made it out of finite
numbers.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jmp_train._jaxpr import compat
from jmp_train._jaxpr.compat import Operand
from jmp_train._jaxpr.interpret import Place
from jmp_train.debug.replay import Replay
from jmp_train.debug.report import NonFiniteReport
from jmp_train.tree import path_name
from jmp_train.types import Function


def first_nonfinite(fn: Function, *args: Any, **kwargs: Any) -> NonFiniteReport:
    """Compute `fn(*args, **kwargs)` by single operations and name what went non-finite first.

    Pass the function whose result is not finite, gradients included, such as the
    `jax.value_and_grad` of a loss. The replay enters jit, calls, scan, while, cond, remat,
    custom_jvp and custom_vjp; a loop runs compiled first, and iteration by iteration only where its
    result is not finite. It runs on concrete arrays, not under jit, and is slow: use it when something is
    wrong.

    Compiled, XLA may keep an intermediate result in float32 that the program rounds to 16 bits;
    here every operation is rounded as the program says. So a step that barely overflowed may be
    finite here, and the reverse.

    Args:
      fn: a JAX function of arrays.
      *args, **kwargs: its arguments, pytrees; leaves that are not arrays reach it unchanged.

    Raises:
      What `fn` raises.

    >>> import jax.numpy as jnp
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
    replay = Replay()
    given = [replay.given(leaves[i], names[i]) for i in arrays]
    body = compat.body_of(closed)
    return replay.report(outs, replay.run(body, given, Place()))


def _named_arguments(
    fn: Function, args: Any, kwargs: Any
) -> tuple[list[str], list[Operand], Callable[[list[Operand]], Any]]:
    """Return the names of the arguments' leaves, the leaves, and the function of such leaves."""
    try:
        parameters = inspect.signature(fn).parameters.values()
        plain = (
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        )
        positional = list(itertools.islice(plain, len(args)))
    except (TypeError, ValueError):  # no signature
        positional = []
    positional += [f"args[{i}]" for i in range(len(positional), len(args))]
    given, tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
    names = []
    for (_, first, *rest), _ in given:
        name = positional[first.idx] if isinstance(first, jax.tree_util.SequenceKey) else first.key
        names.append("/".join(filter(None, (name, path_name(rest)))))

    def call(leaves: list[Operand]) -> Any:
        args, kwargs = jax.tree.unflatten(tree, leaves)
        return fn(*args, **kwargs)

    return names, [leaf for _, leaf in given], call


def _is_array(x: Operand) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic))
