"""The replay names the operation that went wrong, where it lies, and nothing that is harmless."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jmp_train as jt
from jmp_train.debug import NonFiniteReport, OperandRange
from jmp_train.policy.precision import get_precision
from jmp_train.step.step import step_gradients

HALF = jnp.float16


def replay(fn, *args, **kwargs) -> NonFiniteReport:
    return jt.debug.first_nonfinite(jax.value_and_grad(fn), *args, **kwargs)


def total(x):
    return x.astype(jnp.float32).sum()


class NnxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(3, 4, dtype=HALF, rngs=rngs)
        self.second = nnx.Linear(4, 2, dtype=HALF, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)) + 1)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4, dtype=HALF, name="first")(x)) + 1
        return nn.Dense(2, dtype=HALF, name="second")(x)


@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_the_layer_with_a_huge_weight_is_named(library):
    x = jnp.ones((5, 3))
    if library == "nnx":
        graph, params = nnx.split(NnxNet(), nnx.Param)
        params["second"]["kernel"] = params["second"]["kernel"].replace(jnp.full((4, 2), 6e4))
        report = replay(lambda params, x: total(nnx.merge(graph, params)(x)), params, x)
        expected = "params/second/kernel"
    else:
        params = LinenNet().init(jax.random.key(0), x)["params"]
        params["second"]["kernel"] = jnp.full((4, 2), 6e4)
        report = replay(lambda params, x: total(LinenNet().apply({"params": params}, x)), params, x)
        expected = "LinenNet/second"
    op = report.ops[0]
    assert (op.op, op.kind, op.dtype, op.shape) == ("dot_general", "overflow", "float16", (5, 2))
    assert not op.backward and op.module == expected
    assert __file__ in op.source and op.path == ""
    # In float64 by NumPy: the largest element of the product.
    first = params["first"]["kernel"][...]
    hidden = np.maximum(np.asarray(x, np.float64) @ np.asarray(first, np.float64), 0) + 1
    weight = float(HALF(6e4))
    assert op.wide == pytest.approx(float((hidden * weight).sum(1).max()), rel=2e-3)
    assert op.largest_input == weight
    text = str(report)
    assert f"overflow of float16 (largest 65504; {op.wide:.3g} in float32)" in text


def test_a_logarithm_of_zero_that_a_where_hides_is_named_in_the_backward_pass():
    def loss(w):
        return jnp.where(w > 0, jnp.log(w), 0.0).sum()

    report = replay(loss, jnp.array([1.0, 0.0, 2.0]))
    assert report.results == ("1",)  # the loss itself is finite
    assert [(op.op, op.kind, op.backward) for op in report.ops] == [("div", "nan", True)]
    zero = report.ops[0].operands[1]
    assert zero.smallest == 0.0 and report.ops[0].source.endswith("loss)")


def test_an_operand_without_a_finite_value_tells_what_it_holds():
    infinite = jnp.array([jnp.inf, -jnp.inf, jnp.inf])
    (op,) = jt.debug.first_nonfinite(lambda x: x - x[0], infinite).ops
    assert op.operands[0][4:] == (3, 0) and op.operands[1][4:] == (1, 0)
    assert "from float32 [no finite value: 3 infinite], float32 [no finite value: 1 in" in str(op)
    assert str(OperandRange("float16", -1.0, 2.5, "", 1, 1)) == "float16 [-1, 2.5]"
    nan = math.nan
    assert str(OperandRange("float16", nan, nan, "", 2, 1)).endswith("value: 2 infinite, 1 NaN]")
    assert str(OperandRange("float16", nan, nan, "", 0, 0)) == "float16 [no value]"


def test_a_mask_of_infinities_is_not_named_beside_an_overflow():
    mask = jnp.tril(jnp.ones((4, 4), bool))

    def loss(w, x):
        scores = jnp.where(mask, (x * w) @ x.T, -jnp.inf)
        return total(jax.nn.softmax(scores, axis=-1) ** 2)

    x = jnp.ones((4, 4), HALF) * 100
    assert not replay(loss, HALF(1), x).results
    report = replay(loss, HALF(10), x)
    assert report.ops[0].op == "dot_general" and report.ops[0].kind == "overflow"
    assert not report.arguments
    assert all(op.op not in ("select_n", "broadcast_in_dim") for op in report.ops)


def test_what_a_select_did_not_take_is_not_named():
    def fn(x):
        return jnp.where(jnp.array([True, False]), jnp.exp(x), 1 / (x - x))

    report = jt.debug.first_nonfinite(fn, jnp.array([1.0, 1000.0]))
    assert [op.op for op in report.ops] == ["div"]  # exp(1000) is infinite too, and left out


def test_a_row_that_is_masked_out_whole_is_named_where_it_makes_a_nan():
    def loss(w):
        return (jax.nn.softmax(jnp.where(jnp.zeros(3, bool), w, -jnp.inf)) ** 2).sum()

    (op, *_) = replay(loss, jnp.ones(3)).ops
    assert (op.op, op.kind) == ("sub", "nan")


def test_the_iteration_of_a_scan_is_named():
    weights = jnp.array([1.0, 2.0, 3.0, 6e4, 2.0, 1.0], HALF)

    def loss(w, x):
        def body(c, w_i):
            c = c * w_i
            return c, jnp.tanh(c)

        c, ys = jax.lax.scan(body, x, w)
        return total(c) + total(ys)

    report = replay(loss, weights, jnp.ones(2, HALF))
    op = report.ops[0]
    assert (op.op, op.path, op.kind, op.backward) == ("mul", "scan[3]", "overflow", False)
    assert op.operands[1].largest == 6e4 and op.wide == pytest.approx(6 * 6e4, rel=1e-3)
    # What reaches the loss in iteration 3 overflows the state; without it the backward scan does.
    backward = jt.debug.first_nonfinite(
        lambda w, x, ct: jax.vjp(functools.partial(loss, x=x), w)[1](ct)[0],
        weights.at[3].set(2.0),
        jnp.full(2, 1e-3, HALF),
        jnp.float32(2e7),
    )
    assert backward.ops[0].backward and backward.ops[0].kind == "overflow"


@pytest.mark.parametrize("reverse", [False, True])
def test_a_loops_replay_gives_the_loops_own_numbers(reverse):
    # Carry and stacked results with one NaN at iteration 2, against lax.scan itself.
    from jmp_train._jaxpr import compat
    from jmp_train.debug.replay import Replay
    from jmp_train.debug.values import Place

    def fn(xs):
        def body(c, x):
            c = 0.5 * c + jnp.log(x)
            return c, (c * 2, x)

        return jax.lax.scan(body, 0.0, xs, reverse=reverse)

    xs = jnp.array([1.0, 2.0, -1.0, 3.0])
    replayed = Replay()
    body = compat.body_of(jax.make_jaxpr(fn)(xs))
    outs = replayed.run(body, [replayed.given(xs, "xs")], Place())
    for ours, theirs in zip(outs, jax.tree.leaves(fn(xs)), strict=True):
        np.testing.assert_allclose(ours.array, theirs, rtol=1e-6)
    assert "scan[2]" in replayed.report(["c", "y", "x"], outs).ops[0].path


@jax.custom_vjp
def clipped_exp(x):
    return jnp.exp(x)


clipped_exp.defvjp(lambda x: (jnp.exp(x), x), lambda x, ct: (ct * jnp.exp(2 * x),))


@jax.custom_jvp
def sloped_exp(x):
    return jnp.exp(x)


sloped_exp.defjvp(lambda primals, tangents: (sloped_exp(*primals), tangents[0]))


@pytest.mark.parametrize(
    "wrap,path",
    [
        (lambda f: jax.jit(f), "jit:"),
        (lambda f: lambda x: jax.lax.cond(x[0] > 0, f, jnp.sin, x), "cond/1"),
        (lambda f: jax.checkpoint(f), ""),
        (lambda f: lambda x: jax.lax.fori_loop(0, 3, lambda i, y: f(y), x), "scan[1]"),
        (
            lambda f: (
                lambda x: jax.lax.while_loop(
                    lambda c: c[1] < 3, lambda c: (f(c[0]), c[1] + 1), (x, 0)
                )
            ),
            "while[1]",
        ),
        (lambda f: clipped_exp, "custom_vjp_call:"),
        (lambda f: sloped_exp, "custom_jvp_call:"),
    ],
    ids=["jit", "cond", "remat", "scan", "while", "custom_vjp", "custom_jvp"],
)
def test_control_flow_is_entered(wrap, path):
    fn = wrap(lambda x: jnp.exp(x))  # exp(exp(5)) is above float32's largest
    loop = "[1]" in path
    x = jnp.full(2, 5.0 if loop else 100.0)
    report = jt.debug.first_nonfinite(lambda x: fn(x), x)
    assert [(op.op, op.kind) for op in report.ops] == [("exp", "overflow")]
    assert path in report.ops[0].path
    expected = np.exp(np.exp(5.0)) if loop else np.exp(100.0)
    assert report.ops[0].wide == pytest.approx(expected, rel=1e-4)  # float64, from a float32 exp(5)


def test_the_authors_rules_are_replayed_in_forward_and_backward():
    report = replay(lambda x: clipped_exp(x).sum(), jnp.full(3, 60.0))
    assert report.results == ("1",)  # exp(60) is finite, exp(120) is not
    assert [(op.op, op.backward) for op in report.ops] == [("exp", True)]


def test_an_operation_that_remat_runs_again_counts_as_forward():
    def loss(w):
        inner = jax.checkpoint(lambda w: jnp.sin(jnp.exp(w)))
        return inner(w).sum()

    report = replay(loss, jnp.full(2, 100.0))
    assert [(op.op, op.backward) for op in report.ops] == [
        ("exp", False), ("exp", False),
    ]  # fmt: skip


def test_an_overflow_of_the_loss_scale_names_the_gradient_and_the_format():
    def loss_fn(params, batch):
        return jnp.mean((batch["x"] @ params["w"]).astype(jnp.float32) ** 2)

    stepper = jt.make_step(loss_fn, optax.sgd(0.1), "mixed_float16")
    params, batch = {"w": jnp.ones((2, 1))}, {"x": jnp.ones((3, 2))}
    before = stepper.init(params)
    state, info = stepper.step(stepper.init(params), batch)
    assert not info.finite and int(state.last_skip.step) == 1
    assert state.last_skip.nonfinite.tolist() == [True]

    grads = step_gradients(loss_fn, get_precision("mixed_float16"))
    report = jt.debug.first_nonfinite(lambda state, batch: grads(state, batch).grads, before, batch)
    assert report.results == ("w",)
    (op,) = report.ops
    # d loss / d (x w) is 2 * 2 / 3 times 65,536: above 65,504.
    assert op.backward and op.kind == "overflow" and op.wide == pytest.approx(65536 * 4 / 3)
    assert "overflow of float16 (largest 65504" in str(op) and op.reaches == ("w",)


def test_non_finite_input_is_named():
    report = replay(
        lambda w, x: (w * x["image"]).sum(), jnp.ones(2), x={"image": jnp.array([1, jnp.nan])}
    )
    assert report.arguments == ("x/image",) and not report.ops
    assert "non-finite input: x/image" in str(report)


@pytest.mark.parametrize(
    "fn,op",
    [
        (lambda x: x * jnp.array([1, jnp.nan]) + 1, "mul"),
        (lambda x: x.at[0].set(jnp.inf) + 1, "scatter"),
        (lambda x: jnp.full(2, jnp.nan), "broadcast_in_dim"),
        (lambda x: jnp.float32(jnp.nan), None),
    ],
)
def test_a_constant_that_is_not_finite_is_named_where_it_is_read(fn, op):
    report = jt.debug.first_nonfinite(fn, jnp.ones(2))
    assert report.arguments == ("a constant",)
    assert [found.op for found in report.ops] == ([op] if op else [])
    assert "non-finite input: a constant" in str(report)


def test_a_constant_is_not_named_beside_what_else_went_wrong():
    fn = lambda x: (x.at[0].set(jnp.inf), jnp.log(x - 1))
    report = jt.debug.first_nonfinite(fn, jnp.ones(2))
    assert [op.op for op in report.ops] == ["log"] and report.arguments == ()
    report = jt.debug.first_nonfinite(fn, jnp.full(2, jnp.nan))
    assert report.arguments == ("x",) and not report.ops


def test_keys_integers_and_plain_objects_are_handed_on():
    def fn(params, key, mode, n):
        noise = jax.random.normal(key, params.shape)
        return {"y": params / (0 * n) + noise} if mode == "divide" else None

    report = jt.debug.first_nonfinite(fn, jnp.ones(2), jax.random.key(0), "divide", n=jnp.arange(2))
    assert report.results == ("y",) and [op.op for op in report.ops] == ["div"]
    assert str(jt.debug.first_nonfinite(lambda x: x + 1, jnp.ones(2))) == "every result is finite"


def test_a_donating_function_leaves_its_arguments_alone():
    x = jnp.zeros(3)
    jt.debug.first_nonfinite(jax.jit(lambda x: 1 / x, donate_argnums=0), x)
    assert not x.is_deleted()
