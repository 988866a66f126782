"""Which functions jmp_train's autocast handles, and which jaxamp does: one table, and JSON.

A function is handled where value and gradient come back within the rounding of bfloat16 and every
matrix product of the gradient's jaxpr is in bfloat16. jaxamp is in the extra `bench`.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from record import keep

import jmp_train as jt


@jax.custom_vjp
def _gated(w: Any, x: Any) -> Any:
    return jnp.tanh(x @ w)


def _gated_fwd(w: Any, x: Any) -> Any:
    y = jnp.tanh(x @ w)
    return y, (w, x, y)


def _gated_bwd(residuals: Any, ct: Any) -> Any:
    w, x, y = residuals
    ct = ct * (1 - y**2)
    return x.T @ ct, ct @ w.T


_gated.defvjp(_gated_fwd, _gated_bwd)


def _attention(w: Any, x: Any) -> Any:
    return (jax.nn.softmax((x @ w) @ x.T) @ x).sum()


def _layer_norm(w: Any, x: Any) -> Any:
    h = x @ w
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
    return jnp.sin(h @ w).sum()


def _scan(w: Any, x: Any) -> Any:
    return lax.scan(lambda c, _: (jnp.tanh(c @ w), c.sum()), x, None, length=4)[0].sum()


FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "matrix product": lambda w, x: jnp.sin(x @ w).sum(),
    "relu network": lambda w, x: jnp.sin(jax.nn.relu(x @ w) @ w).sum(),
    "attention": _attention,
    "layer norm": _layer_norm,
    "jit inside": lambda w, x: jax.jit(lambda w, x: jnp.tanh(x @ w))(w, x).sum(),
    "scan": _scan,
    "fori_loop": lambda w, x: lax.fori_loop(0, 4, lambda _, c: jnp.tanh(c @ w), x).sum(),
    "cond": lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w.T).sum(),
    "switch": lambda w, x: lax.switch(1, [lambda: x, lambda: jnp.tanh(x @ w)]).sum(),
    "checkpoint": lambda w, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w) @ w)(w, x).sum(),
    "custom_vjp": lambda w, x: _gated(w, x).sum(),
    "vmap inside": lambda w, x: jax.vmap(lambda row: jnp.tanh(row @ w))(x).sum(),
    "grad inside": lambda w, x: (jax.grad(lambda w: jnp.sin(x @ w).sum())(w) ** 2).sum(),
}


def _products(jaxpr: Any) -> Iterator[str]:
    """The result dtypes of the matrix products of a jaxpr, bodies included."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.outvars[0].aval.dtype.name
        for param in eqn.params.values():
            for item in param if isinstance(param, (tuple, list)) else [param]:
                if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                    yield from _products(item)


def _verdict(cast: Callable[[Any], Any], fn: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """How a transform fares on a function: handled or not, why, and the time of one trace."""
    w = 0.3 * jax.random.normal(jax.random.key(0), (8, 8))
    x = jax.random.normal(jax.random.key(1), (4, 8))
    want = jax.value_and_grad(fn)(w, x)
    try:
        step = jax.value_and_grad(cast(fn))
        start = time.perf_counter()
        dtypes = list(_products(jax.make_jaxpr(step)(w, x)))
        seconds = time.perf_counter() - start
        got = jax.jit(step)(w, x)
    except Exception as error:  # noqa: BLE001  (whatever a library raises is its answer)
        words = str(error).splitlines() or [""]
        return {"handled": False, "why": f"{type(error).__name__}: {words[0]}"[:90]}
    error = max(
        float(jnp.abs(g - v).max() / jnp.maximum(jnp.abs(v).max(), 1.0))
        for g, v in zip(got, want, strict=True)
    )
    full = sum(d != "bfloat16" for d in dtypes)
    why = f"{full} of {len(dtypes)} products in float32" if full else ""
    why = why or ("" if error < 0.05 else f"relative error {error:.2f}")
    return {"handled": not why, "why": why, "error": error, "trace_seconds": seconds}


def _contenders() -> dict[str, Callable[[Any], Any]]:
    contenders: dict[str, Callable[[Any], Any]] = {"jmp_train": jt.autocast}
    try:
        jaxamp = importlib.import_module("jaxamp")
    except ImportError:
        print("jaxamp is not installed (pip install -e '.[bench]'); only jmp_train is measured")
        return contenders
    contenders["jaxamp"] = functools.partial(jaxamp.amp, compute_dtype=jnp.bfloat16)
    return contenders


def main() -> None:
    """Tries every function, prints a table and keeps the result."""
    contenders = _contenders()
    rows = {
        name: {who: _verdict(cast, fn) for who, cast in contenders.items()}
        for name, fn in FUNCTIONS.items()
    }
    print(f"{'function':<16}" + "".join(f"{who:<12}" for who in contenders) + "why not")
    for name, row in rows.items():
        marks = "".join(f"{'yes' if v['handled'] else 'no':<12}" for v in row.values())
        why = "; ".join(f"{who}: {v['why']}" for who, v in row.items() if v["why"])
        print(f"{name:<16}{marks}{why}")
    print(keep("autocast", rows))


if __name__ == "__main__":
    main()
