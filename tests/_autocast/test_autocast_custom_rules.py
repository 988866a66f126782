"""Backward rules that read a constant residual, alone and as diffrax and equinox write them.

The oracles are closed forms in float64 NumPy.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marks import first_quick
from jax import lax

import jmp_train as jt

# The constants that the rules below read in Python, as NumPy and JAX make them.
CONSTANTS = {
    "numpy_scalar": np.array(True),
    "numpy_array": np.array([True, False]),
    "python_bool": True,
    "float": np.float32(2.0),
    "jax_array": jnp.array([1.0, 0.0]),
}


def doubled_sine(constant):
    """2 sin(x), whose backward rule branches on a residual that is a constant."""

    @jax.custom_vjp
    def f(x):
        return 2 * jnp.sin(x)

    def forward(x):
        return f(x), (x, constant)

    def backward(residuals, g):
        x, flag = residuals
        if np.asarray(flag).reshape(-1)[0]:
            return (2 * g * jnp.cos(x),)
        return (jnp.zeros_like(x),)

    f.defvjp(forward, backward)
    return f


FLAGGED = doubled_sine(np.array(True))
X = np.array([[0.5, -1.0], [0.25, 2.0]], np.float32)
FIRST, SECOND = 2 * np.cos(X.astype(np.float64)), -2 * np.sin(X.astype(np.float64))
EPSILON = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # half a unit in the last place, relative


def loss(x):
    return FLAGGED(x @ jnp.eye(2)).sum()


def looped(x):
    return lax.scan(lambda c, _: (c, FLAGGED(c @ jnp.eye(2)).sum()), x, None, length=1)[1].sum()


BODIES = {
    "plain": loss,
    "jit": jax.jit(loss),
    "scan": looped,
    "cond": lambda x: lax.cond(x[0, 0] > 0, loss, lambda x: 0.0 * x.sum(), x),
    "remat": jax.checkpoint(loss),
    "vmap": lambda x: jax.vmap(lambda row: FLAGGED(row @ jnp.eye(2)).sum())(x).sum(),
}

ORDERS = {
    "grad_of_autocast": lambda f, d: jax.grad(jt.autocast(f, d)),
    "autocast_of_grad": lambda f, d: jt.autocast(jax.grad(f), d),
    "grad_of_jit_of_autocast": lambda f, d: jax.grad(jax.jit(jt.autocast(f, d))),
    "jit_of_grad_of_autocast": lambda f, d: jax.jit(jax.grad(jt.autocast(f, d))),
    "value_and_grad": lambda f, d: lambda x: jax.value_and_grad(jt.autocast(f, d))(x)[1],
}


def close(got, expected, dtype="bfloat16"):
    """Within three roundings of the half format: the product's, the sine's, the cotangent's."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=3 * EPSILON[dtype] * 2)


@pytest.mark.parametrize("dtype", first_quick(["bfloat16", "float16"]))
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("body", BODIES)
def test_backward_rule_reads_a_constant_residual(body, order, dtype):
    close(ORDERS[order](BODIES[body], dtype)(X), FIRST, dtype)


@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("jit", [False, True])
def test_constants_of_every_kind_stay_concrete(constant, jit):
    f = doubled_sine(CONSTANTS[constant])
    grad = jax.grad(jt.autocast(lambda x: f(x @ jnp.eye(2)).sum()))
    close((jax.jit(grad) if jit else grad)(X), FIRST)


@pytest.mark.parametrize("flag", [np.array(True), np.array([True, False])])
@pytest.mark.parametrize("jit", [False, True])
def test_constant_operand_kept_as_a_residual_stays_concrete(flag, jit):
    @jax.custom_vjp
    def f(x, flag):
        return 2 * jnp.sin(x)

    def backward(residuals, g):
        x, flag = residuals
        return (2 * g * jnp.cos(x) if flag.reshape(-1)[0] else None), None

    f.defvjp(lambda x, flag: (f(x, flag), (x, flag)), backward)
    grad = jax.grad(jt.autocast(lambda x: f(x @ jnp.eye(2), flag).sum()))
    close((jax.jit(grad) if jit else grad)(X), FIRST)


def test_second_derivatives_pass_a_constant_residual():
    cast = jt.autocast(loss)
    twice = jax.grad(lambda x: jax.grad(cast)(x).sum())
    close(twice(X), SECOND)
    close(jax.jit(twice)(X), SECOND)
    close(jax.grad(lambda x: jt.autocast(jax.grad(loss))(x).sum())(X), SECOND)


def test_vmap_of_grad_passes_a_constant_residual():
    rows = jax.vmap(jax.grad(jt.autocast(lambda row: FLAGGED(row @ jnp.eye(2)).sum())))
    close(rows(X), FIRST)


def test_residual_that_depends_on_data_is_still_rounded_once():
    """A float32 residual computed from data is traced, so the rule runs in the planned dtypes."""

    @jax.custom_vjp
    def f(x):
        return x * x

    def backward(x, g):
        assert isinstance(x, jax.core.Tracer)
        return (2 * x * g,)

    f.defvjp(lambda x: (f(x), x), backward)
    got = jax.grad(jt.autocast(lambda x: f(x @ jnp.eye(2)).sum()))(X)
    close(got, 2 * X.astype(np.float64))


# Published packages. dy/dt = -a y, so y(1) = exp(-a) y0 and d(sum y)/da = -exp(-a) y0.

RATE = np.array([0.5, 1.0], np.float32)
Y0 = np.array([1.0, 2.0], np.float32)
DECAYED = np.exp(-RATE.astype(np.float64)) * Y0


def decay(solver):
    """The sum of y(1) under dy/dt = -(diag(a) y), by two steps of a solver."""

    def run(rate):
        term = diffrax.ODETerm(lambda t, y, a: -(jnp.diag(a) @ y))
        out = diffrax.diffeqsolve(term, solver, 0.0, 1.0, 0.5, jnp.asarray(Y0), rate, max_steps=2)
        return jnp.sum(out.ys)

    return run


SOLVERS = {
    "tsit5": diffrax.Tsit5(),
    # The root finder's tolerance lies above the noise of half-precision products.
    "kvaerno3": diffrax.Kvaerno3(root_finder=diffrax.VeryChord(rtol=5e-2, atol=5e-2)),
}


@pytest.mark.parametrize("solver", ["tsit5", "kvaerno3"])
@pytest.mark.slow
def test_gradient_through_diffrax_default_adjoint(solver):
    """Each of the two steps rounds seven products at most, so 16 roundings bound the error."""
    value, grad = jax.jit(jax.value_and_grad(jt.autocast(decay(SOLVERS[solver]))))(RATE)
    tolerance = 16 * EPSILON["bfloat16"]
    np.testing.assert_allclose(value, DECAYED.sum(), rtol=tolerance)
    np.testing.assert_allclose(grad, -DECAYED, rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_gradient_through_diffrax_in_every_order(solver, order):
    grad = ORDERS[order](decay(SOLVERS[solver]), "bfloat16")(RATE)
    np.testing.assert_allclose(grad, -DECAYED, rtol=16 * EPSILON["bfloat16"])


def checkpointed(w, x):
    """x w^5 by equinox's checkpointed loop."""

    def body(carry):
        i, x = carry
        return i + 1, x @ w

    carry = (jnp.array(0), x)
    loop = eqx.internal.while_loop(
        lambda c: c[0] < 5, body, carry, kind="checkpointed", max_steps=8
    )
    return loop[1]


W = np.diag([0.5, 1.25]).astype(np.float32)
BATCH = {"x": jnp.array([[1.0, 2.0]]), "y": jnp.array([[0.5, 1.0]])}


@pytest.mark.parametrize("order", first_quick(ORDERS))
def test_gradient_through_equinox_checkpointed_loop(order):
    """Five products and their transposes: ten roundings."""
    grad = ORDERS[order](lambda w: checkpointed(w, BATCH["x"]).sum(), "float16")(W)
    expected = 5 * np.diag(W).astype(np.float64) ** 4 * np.asarray(BATCH["x"][0])
    np.testing.assert_allclose(np.diag(grad), expected, rtol=10 * EPSILON["float16"])


def loop_loss(params, batch):
    out = checkpointed(jnp.diag(params["w"]), batch["x"])
    return jnp.sum((out - batch["y"]).astype(jnp.float32) ** 2)


def loop_gradient(w):
    x, y = (np.asarray(BATCH[k][0], np.float64) for k in ("x", "y"))
    return 2 * (x * w**5 - y) * 5 * x * w**4


def ode_loss(params, batch):
    return decay(diffrax.Tsit5())(params["w"]).astype(jnp.float32) ** 2


def ode_gradient(w):
    each = np.exp(-w) * Y0
    return -2 * each.sum() * each


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", None])
@pytest.mark.parametrize(
    ("loss", "gradient"), [(loop_loss, loop_gradient), (ode_loss, ode_gradient)]
)
def test_make_step_trains_through_constant_residuals(loss, gradient, policy):
    """One SGD step of rate 1; 32 roundings bound the error of value times gradient."""
    dtype = "float16" if policy == "mixed_float16" else "bfloat16"
    scale = jt.StaticLossScale(2.0**6) if policy == "mixed_float16" else None
    step = jt.make_step(jt.autocast(loss, dtype), optax.sgd(1.0), policy, loss_scale=scale)
    w = np.diag(W).astype(np.float64)
    state, _ = step.step(step.init({"w": jnp.asarray(w, jnp.float32)}), BATCH)
    got = w - np.asarray(state.params["w"], np.float64)
    np.testing.assert_allclose(got, gradient(w), rtol=32 * EPSILON[dtype])


@pytest.mark.parametrize("wide", [True, False], ids=["float32", "int32"])
def test_a_rule_that_closes_over_a_constant_under_vmap_of_jit(wide):
    table = np.arange(3, dtype=np.float32 if wide else np.int32)

    @jax.custom_vjp
    def f(x):
        return x @ x + jnp.asarray(table)

    f.defvjp(lambda x: (f(x) + 0 * jnp.asarray(table), x), lambda x, g: (g @ x.T + x.T @ g,))
    x = jnp.stack([jnp.eye(3), 2 * jnp.eye(3)])
    way = lambda f: jax.grad(lambda x: jax.vmap(jax.jit(f))(x).sum())
    np.testing.assert_array_equal(way(jt.autocast(f))(x), way(f)(x))
    batched = jt.autocast(lambda x: jax.vmap(jax.jit(f))(x).sum())
    np.testing.assert_array_equal(jax.grad(batched)(x), way(f)(x))
