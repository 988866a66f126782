"""The best step that we can write by hand in JAX, without jmp_train: the rival to beat.

Casts are written in, buffers are donated, attention is cuDNN's on a GPU, and float16 has dynamic
loss scaling with a select. The networks are those of `jmp_train.models`, on the same parameters.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.gpu.table import Workload


def make(
    workload: Workload, optimizer: optax.GradientTransformation, compute: Any, steps: int
) -> tuple[Any, Any, Any]:
    """The jitted step, its init and its count of skipped steps.

    Args:
      workload: a "gpt" or an "mlp".
      optimizer: of float32 parameters.
      compute: dtype of the forward and backward pass; float16 has a dynamic loss scale.
      steps: of a call, one after the other under `lax.scan`; 1 takes a batch as it is.
    """
    loss_fn = functools.partial(_gpt if workload.kind == "gpt" else _mlp, workload)

    def cast(tree: Any) -> Any:
        half = lambda x: x.astype(compute) if jnp.issubdtype(x.dtype, jnp.floating) else x
        return jax.tree.map(half, tree)

    def plain(state: Any, batch: Any) -> Any:
        params, opt_state = state
        loss, grads = jax.value_and_grad(lambda p: loss_fn(cast(p), cast(batch)))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    def scaled(state: Any, batch: Any) -> Any:
        params, opt_state, scale, good, skipped = state
        scaled_loss = lambda p: loss_fn(cast(p), cast(batch)) * scale
        loss, grads = jax.value_and_grad(scaled_loss)(params)
        grads = jax.tree.map(lambda g: g / scale, grads)
        finite = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        new = (optax.apply_updates(params, updates), new_opt_state)
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (params, opt_state))
        grow = good + 1 == 2000
        new_scale = jnp.where(finite, jnp.where(grow, 2 * scale, scale), scale / 2)
        good = jnp.where(finite & ~grow, good + 1, 0)
        return (*kept, new_scale, good, skipped + ~finite), loss / scale

    def init(params: Any) -> Any:
        state = (params, optimizer.init(params))
        if compute == jnp.float16:
            state = (*state, jnp.float32(2**16), jnp.int32(0), jnp.int32(0))
        return jax.tree.map(jnp.array, state)

    one = scaled if compute == jnp.float16 else plain
    step = one if steps == 1 else lambda state, batches: jax.lax.scan(one, state, batches)
    skipped = lambda state: state[4] if compute == jnp.float16 else 0
    return jax.jit(step, donate_argnums=0), init, skipped


def _mlp(workload: Workload, params: Any, batch: Any) -> jax.Array:
    x, layers = batch["image"], params["layers"]
    for index in range(len(layers)):
        x = x @ layers[index]["kernel"] + layers[index]["bias"]
        x = x if index == len(layers) - 1 else jax.nn.gelu(x)
    logits = x.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def _gpt(workload: Workload, params: Any, batch: Any) -> jax.Array:
    tokens = batch["tokens"]
    table = params["embed"]["embedding"]

    def block(x: jax.Array, p: Any) -> Any:
        qkv = _norm(x, p["norm1"]) @ p["attention"]["qkv"]["kernel"]
        qkv = qkv.reshape(*x.shape[:2], 3, workload.heads, -1)
        q, k, v = _rotary(qkv[:, :, 0]), _rotary(qkv[:, :, 1]), qkv[:, :, 2]
        x = x + _attention(q, k, v).reshape(x.shape) @ p["attention"]["out"]["kernel"]
        gate, value = jnp.split(_norm(x, p["norm2"]) @ p["mlp"]["up"]["kernel"], 2, axis=-1)
        return x + (jax.nn.silu(gate) * value) @ p["mlp"]["down"]["kernel"], None

    if workload.remat != "none":
        saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = saved if workload.remat == "dots" else None
        block = jax.checkpoint(block, policy=policy, prevent_cse=False)
    x, _ = jax.lax.scan(block, table[tokens[:, :-1]], params["blocks"])
    x = _norm(x, params["norm"])
    logits = jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def _norm(x: jax.Array, p: Any) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
    return (wide * p["scale"].astype(jnp.float32)).astype(x.dtype)


def _rotary(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = (jnp.asarray(f(angles)[:, None], jnp.float32) for f in (np.cos, np.sin))
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    on_gpu, half = jax.default_backend() == "gpu", q.dtype != jnp.float32
    if (
        half and not on_gpu
    ):  # a CPU has no float16 product of the kind that JAX's attention asks for
        scores = jnp.einsum("bthk,bshk->bhts", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
        seen = np.tril(np.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)).astype(v.dtype)
        return jnp.einsum("bhts,bshk->bthk", weights, v)
    way = "cudnn" if half else "xla"
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=way)
