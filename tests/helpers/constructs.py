"""Programs with every construct of JAX, and every order of transformations of them."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

import jmp_train as jt


def scan_loop(w, x):
    def body(c, _):
        c = jnp.tanh(c @ w)
        return c, c.sum()

    c, sums = lax.scan(body, x, None, length=3)
    return c.sum() + sums.sum()


def while_loop(w, x):
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ w)), (0, x))[1]


@jax.custom_jvp
def tripled(w, x):
    return jnp.sin(x @ w)


@tripled.defjvp
def tripled_jvp(primals, tangents):  # three times the true derivative, to see which rule is used
    (w, x), (dw, dx) = primals, tangents
    return tripled(w, x), 3 * jnp.cos(x @ w) * (dx @ w + x @ dw)


@jax.custom_vjp
def doubled(w, x):
    return jnp.tanh(x @ w)


def doubled_forward(w, x):
    y = jnp.tanh(x @ w)
    return y, (w, x, y)


def doubled_backward(residuals, ct):  # twice the true derivative for w
    w, x, y = residuals
    ct = ct * (1 - y**2)
    return 2 * (x.T @ ct), ct @ w.T


doubled.defvjp(doubled_forward, doubled_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fixed_point(f, w, x):
    return lax.while_loop(lambda s: s[1] < 30, lambda s: (f(w, x, s[0]), s[1] + 1), (x * 0, 0))[0]


def fixed_point_forward(f, w, x):
    z = fixed_point(f, w, x)
    return z, (w, x, z)


def fixed_point_backward(f, residuals, ct):
    w, x, z = residuals
    vjp_z = jax.vjp(lambda z: f(w, x, z), z)[1]
    u = lax.fori_loop(0, 30, lambda _, u: ct + vjp_z(u)[0], ct)
    return jax.vjp(lambda w, x: f(w, x, z), w, x)[1](u)


fixed_point.defvjp(fixed_point_forward, fixed_point_backward)

CONSTRUCTS = {
    "plain": lambda w, x: jax.nn.logsumexp(jax.nn.relu(x @ w) @ w),
    "jit": lambda w, x: jax.jit(lambda w, x: jax.jit(jax.nn.softmax)(x @ w) @ w)(w, x).sum(),
    "scan": scan_loop,
    "nested_scan": lambda w, x: lax.scan(
        lambda c, _: (lax.scan(lambda d, _: (jnp.tanh(d @ w), None), c, None, length=2)[0], None),
        x,
        None,
        length=2,
    )[0].sum(),
    "scan_xs": lambda w, x: lax.scan(
        lambda c, layer: (jnp.tanh(c @ layer), c), x, jnp.stack([w, w.T])
    )[1].sum(),
    "while": lambda w, x: while_loop(w, x).sum(),
    "fori": lambda w, x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w), x).sum(),
    "cond": lambda w, x: lax.cond(x.sum() > 0, lambda: (x @ w).sum(), lambda: jnp.exp(x @ w).sum()),
    "switch": lambda w, x: lax.switch(
        1, [lambda a: a @ w, lambda a: jnp.sin(a @ w), lambda a: a], x
    ).sum(),
    "remat": lambda w, x: jax.checkpoint(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w))(w, x).sum(),
    "scan_remat": lambda w, x: lax.scan(
        jax.checkpoint(lambda c, _: (jnp.tanh(c @ w), None)), x, None, length=3
    )[0].sum(),
    "custom_jvp": lambda w, x: tripled(w, x).sum(),
    "custom_vjp": lambda w, x: doubled(w, x).sum(),
    "scan_custom_vjp": lambda w, x: lax.scan(lambda c, _: (doubled(w, c), None), x, None, length=3)[
        0
    ].sum(),
    "implicit": lambda w, x: jnp.sum(fixed_point(lambda w, x, z: jnp.tanh(z @ w * 0.2 + x), w, x)),
    "vmap": lambda w, x: jax.vmap(lambda row: jax.nn.silu(row @ w))(x).sum(),
    "grad_inside": lambda w, x: jnp.sum(jax.grad(lambda w: jnp.sin(x @ w).sum())(w) ** 2),
}
_cast = jt.autocast
ORDERS = {
    "autocast": (lambda f: _cast(f), lambda f: f),
    "jit(autocast)": (lambda f: jax.jit(_cast(f)), lambda f: f),
    "grad(autocast)": (lambda f: jax.jit(jax.grad(_cast(f))), jax.grad),
    "autocast(grad)": (lambda f: jax.jit(_cast(jax.grad(f))), jax.grad),
    "jvp(autocast)": (lambda f: lambda w, x: jax.jvp(_cast(f), (w, x), (w, x))[1],
                      lambda f: lambda w, x: jax.jvp(f, (w, x), (w, x))[1]),
    "vmap(grad(autocast))": (lambda f: jax.jit(jax.vmap(jax.grad(_cast(f)))),
                             lambda f: jax.vmap(jax.grad(f))),
    "autocast(vmap(grad))": (lambda f: jax.jit(_cast(jax.vmap(jax.grad(f)))),
                             lambda f: jax.vmap(jax.grad(f))),
    "autocast(autocast)": (lambda f: _cast(_cast(f)), lambda f: f),
}  # fmt: skip
NOT_REVERSE = {"while"}  # JAX has no reverse mode for while_loop,
NOT_FORWARD = {"custom_vjp", "scan_custom_vjp", "implicit"}  # and no forward mode for custom_vjp
