"""The walk over a jaxpr: values of any sort, each dropped after its last use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmp_train._jaxpr import compat
from jmp_train._jaxpr.walk import walk


def test_a_walk_that_binds_each_equation_computes_the_function():
    shift = np.arange(3.0, dtype=np.float32)

    def fn(x):
        return jnp.sin(x + shift) * 2, x

    x = jnp.ones(3)
    body = compat.body_of(jax.make_jaxpr(fn)(x))
    env = walk(
        body,
        [x],
        lambda _, eqn, operands: compat.bind(eqn.primitive, operands, eqn.params),
        constant=lambda _, array: array,
        literal=lambda literal: literal.val,
    )
    for ours, theirs in zip(env.read_all(body.outvars), fn(x), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("keep_all", [False, True])
def test_values_are_dropped_after_their_last_use(keep_all):
    def fn(x):
        y = jnp.sin(x)
        unused = jnp.cos(y)  # noqa: F841
        return jnp.tan(y)

    body = compat.body_of(jax.make_jaxpr(fn)(1.0))
    env = walk(
        body,
        ["x"],
        lambda i, eqn, operands: [f"{eqn.primitive.name}({operands[0]})"],
        constant=lambda *_: "",
        literal=lambda _: "",
        keep_all=keep_all,
    )
    assert env.read_all(body.outvars) == ["tan(sin(x))"]
    intermediate = body.eqns[0].outvars[0]
    if keep_all:
        assert env.read(intermediate) == "sin(x)"
    else:
        with pytest.raises(KeyError):
            env.read(intermediate)
