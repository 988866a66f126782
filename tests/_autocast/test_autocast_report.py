"""`explain_autocast` tells what autocast does."""

import collections

import jax
import jax.numpy as jnp
from helpers.constructs import CONSTRUCTS
from helpers.programs import equations
from jax import lax

import jmp_train as jt


def test_the_report_names_path_dtype_rule_and_source():
    def f(w, x):
        c, _ = lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=2)
        with jt.with_precision("float32"):
            z = c @ w
        return jnp.exp(c @ w).sum() + z.sum() + jnp.linalg.cholesky(w).sum()

    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    report = jt.debug.explain_autocast(f, x, x)
    rows = {(r.path, r.op): r for r in report.rows}
    assert (rows["scan", "dot_general"].dtype, rows["scan", "dot_general"].rule) == (
        "bfloat16",
        "compute",
    )
    assert {r.rule for r in report.rows if r.op == "dot_general"} == {"compute", "region"}
    assert rows["", "exp"].rule == "float32"
    assert any(r.op == "cholesky" and r.rule == "as written" for r in report.rows)
    assert __file__ in rows["scan", "tanh"].source
    lines = str(report).splitlines()
    column = lines[0].index("runs in")
    assert all(
        line[column:].startswith(r.dtype) for line, r in zip(lines[1:], report.rows, strict=True)
    )


def test_the_report_agrees_with_what_is_emitted():
    w, x = jnp.ones((6, 6)), jnp.ones((3, 6))
    for construct in ("plain", "jit", "scan", "cond", "remat", "vmap"):
        f = CONSTRUCTS[construct]
        told = collections.Counter(
            (r.op, r.dtype)
            for r in jt.debug.explain_autocast(f, w, x).rows
            if r.op in ("tanh", "dot_general", "exp")
        )
        seen = collections.Counter(
            (e.primitive.name, e.invars[0].aval.dtype.name)
            for e in equations(jax.make_jaxpr(jt.autocast(f))(w, x))
            if e.primitive.name in ("tanh", "dot_general", "exp")
        )
        assert told == seen
