"""Autocast and the non-finite replay enter the same primitives, under every name that they have."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives

import jmp_train as jt
from jmp_train._jaxpr.bodies import CONSTRUCTS, bodies_of, body_names, construct_of
from jmp_train.testing import assert_contractions_in


def overflowing(w, x):
    return jnp.exp(x @ w)


def called(primitive):
    """`overflowing` as the body of a call primitive, as JAX binds it."""

    def fn(w, x):
        body = jax.make_jaxpr(overflowing)(w, x)
        body = body if primitive.name == "closed_call" else body.jaxpr
        params = primitive.get_bind_params({"call_jaxpr": body})
        return primitive.bind(w, x, **params)[0]

    return fn


def with_jvp(w, x):
    fn = jax.custom_jvp(overflowing)
    fn.defjvp(lambda primals, tangents: (fn(*primals), tangents[1]))
    return fn(w, x)


def with_vjp(w, x):
    fn = jax.custom_vjp(overflowing)
    fn.defvjp(lambda w, x: (fn(w, x), w), lambda w, ct: (w, ct))
    return fn(w, x)


ONCE = {
    "jit": jax.jit(overflowing),
    "remat2": jax.checkpoint(overflowing),
    primitives.call_p.name: called(primitives.call_p),
    primitives.closed_call_p.name: called(primitives.closed_call_p),
    "custom_jvp_call": with_jvp,
    "custom_vjp_call": with_vjp,
}
W, X = jnp.full((2, 2), 100.0), jnp.ones((3, 2))


@pytest.mark.parametrize("primitive", ONCE)
def test_autocast_enters_a_body_that_runs_once(primitive):
    names = [e.primitive.name for e in jax.make_jaxpr(ONCE[primitive])(W, X).eqns]
    assert names == [primitive]
    assert_contractions_in(jt.autocast(ONCE[primitive]), W, X)


@pytest.mark.parametrize("primitive", ONCE)
def test_the_replay_enters_a_body_that_runs_once(primitive):
    (op,) = jt.debug.first_nonfinite(ONCE[primitive], W, X).ops
    assert (op.op, op.path.split(":")[0]) == ("exp", primitive)


@pytest.mark.parametrize("primitive", [primitives.call_p.name, "jit", "remat2"])
def test_both_reports_name_a_body_alike(primitive):
    rows = jt.debug.explain_autocast(ONCE[primitive], W, X).rows
    (op,) = jt.debug.first_nonfinite(ONCE[primitive], W, X).ops
    assert {row.path for row in rows if row.op == "exp"} == {op.path}


def test_no_rule_can_name_a_primitive_that_is_entered():
    for name in CONSTRUCTS:
        with pytest.raises(ValueError, match="its body is entered"):
            jt.default_op_rules.extend(compute=[name])


def test_loops_and_branches_name_each_of_their_bodies():
    def fn(x):
        x = jax.lax.while_loop(lambda x: x < 3, lambda x: x + 1, x)
        x = jax.lax.cond(x > 2, jnp.sin, jnp.cos, x)
        return jax.lax.scan(lambda c, _: (c + 1, c), x, None, length=2)

    eqns = [e for e in jax.make_jaxpr(fn)(1.0).eqns if construct_of(e)]
    assert [body_names(e) for e in eqns] == [
        ["while/cond", "while/body"],
        ["cond/0", "cond/1"],
        ["scan"],
    ]
    assert [len(bodies_of(e)) for e in eqns] == [2, 2, 1]


def test_the_replay_runs_a_shard_map_whole():
    # Its body sees one device's part and names of mesh axes, so it cannot run outside.
    mesh = jax.make_mesh((1,), ("i",))
    spec = jax.sharding.PartitionSpec()
    fn = jax.shard_map(overflowing, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    assert [op.op for op in jt.debug.first_nonfinite(fn, W, X).ops] == ["shard_map"]


def test_a_linen_remat_is_entered_by_both():
    net = nn.remat(nn.Dense)(2)
    params = net.init(jax.random.key(0), X)
    assert_contractions_in(jt.autocast(net.apply), params, X)
    params = jax.tree.map(lambda p: jnp.full_like(p, 3e38), params)
    assert {op.op for op in jt.debug.first_nonfinite(net.apply, params, X).ops} <= {
        "dot_general",
        "add",
    }
    assert not np.isfinite(net.apply(params, X)).any()
