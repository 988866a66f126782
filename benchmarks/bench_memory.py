"""How much memory does a transformer's training step need under autocast and under a policy?

Compiles the gradient of a plain float32 transformer (Flax NNX, no dtype in its code) at a size where
activations dominate, four ways, and reads `memory_analysis()`; nothing is run. `--target tpu` compiles
for a TPU v5e that need not be there (`pip install libtpu`, the version that `jax[tpu]` asks for);
the default is the device at hand. XLA on a CPU computes in float32 whatever it is asked, and keeps
float32 copies for that, so a CPU shows no saving.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import SingleDeviceSharding
from record import device_for, keep

import jmp_train as jt
from jmp_train.flax import apply_policy


class Block(nnx.Module):
    """A pre-norm transformer block; `dtype` is for the hand-written rival alone."""

    def __init__(self, d: int, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(d, dtype=dtype, rngs=rngs)
        self.qkv = nnx.Linear(d, 3 * d, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(d, d, dtype=dtype, rngs=rngs)
        self.norm2 = nnx.LayerNorm(d, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(d, 4 * d, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * d, d, dtype=dtype, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        batch, length, d = x_BxTxD.shape
        heads = self.qkv(self.norm1(x_BxTxD)).reshape(batch, length, 3, d // 64, 64)
        q, k, v = (heads[:, :, i] for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8.0
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e9)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x_BxTxD.shape)
        x_BxTxD = x_BxTxD + self.out(mixed)
        return x_BxTxD + self.down(nnx.gelu(self.up(self.norm2(x_BxTxD))))


class Transformer(nnx.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, width: int, depth: int, dtype: Any, rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(width, dtype, rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, 256, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x_BxTxD = self.embed(tokens)
        for block in self.blocks:
            x_BxTxD = block(x_BxTxD)
        return self.head(x_BxTxD)


def gradient_of(
    width: int, depth: int, dtype: Any, change: Callable[[Any], Any], cast: Any
) -> tuple[Callable[..., Any], Any]:
    """The gradient of the model's loss, and its parameters' shapes."""

    def make() -> Any:
        return change(Transformer(width, depth, dtype, nnx.Rngs(0)))

    graph, params = nnx.split(nnx.eval_shape(make), nnx.Param)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(tokens).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    return jax.value_and_grad(cast(loss)), params


def main() -> None:
    """Compiles, prints a table and keeps the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default=None)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    options = parser.parse_args()
    device = device_for(options.target)
    on_device = SingleDeviceSharding(device)
    same = lambda x: x
    ways = {
        "float32": (None, same, same),
        "autocast bfloat16": (None, same, jt.autocast),
        "apply_policy mixed_bfloat16": (None, lambda m: apply_policy(m, "mixed_bfloat16"), same),
        "dtype=bfloat16 by hand": (jnp.bfloat16, same, same),
    }
    rows: dict[str, dict[str, float]] = {}
    for name, (dtype, change, cast) in ways.items():
        grad, params = gradient_of(options.width, options.depth, dtype, change, cast)
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device)
        tokens = jax.ShapeDtypeStruct((options.batch_size, options.length), jnp.int32)
        compiled = jax.jit(grad).lower(jax.tree.map(place, params), place(tokens)).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        first = rows.get("float32", {}).get("temporary_mib")
        temporary = memory.temp_size_in_bytes / 2**20
        rows[name] = {"temporary_mib": temporary, "of_float32": temporary / (first or temporary)}
        print(f"{name:28} {temporary:9.1f} MiB  {rows[name]['of_float32']:.3f} of float32")
    print(
        keep(
            "memory-for-tpu" if options.target else "memory",
            rows,
            device_kind=device.device_kind,
            **vars(options),
        )
    )


if __name__ == "__main__":
    main()
