"""How small may an update be for `kahan` to count it, and how far off is the sum of many?

A sixteenth of a parameter is added to it in equal additions, for every significand of a binade, both
signs of the parameter and both directions. The sum, parameter and compensation together, is compared
with the exact one. Nothing is random and nothing is timed.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from record import keep

import jmp_train as jt

FORMATS = {"bfloat16": range(11, 20), "float16": range(14, 23)}


def main() -> None:
    """Measures, prints a table and keeps the result."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    for name, sizes in FORMATS.items():
        for size in sizes:
            share = share_of_the_sum(name, size)
            row = {
                "format": name,
                "addition": f"2^-{size}",
                "additions": 2 ** (size - 4),
                "lowest_share": float(share.min()),
                "highest_share": float(share.max()),
            }
            rows.append(row)
            print(
                "{format:8} {addition:>6} of a parameter, {additions:6} times: "
                "{lowest_share:.3f} to {highest_share:.3f} of the sum".format(**row),
                flush=True,
            )
    print(keep("kahan", rows))


def share_of_the_sum(name: str, size: int) -> np.ndarray:
    """What arrives of 2^(size - 4) additions of 2^-size of a parameter, over their exact sum."""
    significands = 1 + np.arange(0, 1, float(jnp.finfo(name).eps))
    start = np.concatenate([significands, -significands] * 2)
    direction = np.repeat([1.0, -1.0], 2 * len(significands))
    addition = direction * start * 2.0**-size
    value, lost = jnp.asarray(start, name), jnp.zeros(start.shape, jnp.bfloat16)
    value, lost = added(value, lost, jnp.asarray(addition, jnp.float32), 2 ** (size - 4))
    return (np.float64(value) + np.float64(lost) - start) / (addition * 2.0 ** (size - 4))


@functools.partial(jax.jit, static_argnums=3)
def added(value: jax.Array, lost: jax.Array, addition: jax.Array, times: int) -> tuple:
    """Parameters and compensations after so many additions."""
    add = lambda _, pair: jt.numerics.kahan_add(pair[0], pair[1], addition)
    return jax.lax.fori_loop(0, times, add, (value, lost))


if __name__ == "__main__":
    main()
