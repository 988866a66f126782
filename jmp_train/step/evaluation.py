"""Means of per-example metrics over a data set, with one compiled program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jmp_train.policy.policy import Policy
from jmp_train.policy.precision import Precision, get_precision
from jmp_train.policy.rules import Rules
from jmp_train.types import PyTree


def make_evaluate(
    metrics_fn: Callable[..., dict[str, jax.Array]],
    policy: str | Policy | Rules | Precision | None = "float32",
) -> Callable[..., dict[str, float]]:
    """Make `evaluate(params, batches, model_state=None) -> {name: mean over the examples}`.

    Args:
      metrics_fn: `metrics_fn(params, batch)` returns one value per example for each metric: shape
        (batch,), floating or bool. It may return several values per example, such as one for each
        token; then all metrics have the same shape. If there is a model state, `metrics_fn` is
        called with `model_state=` too. It gets parameters and batch in the policy's compute dtype.
      policy: an argument of `get_precision`; `Rules` and None cast nothing.

    Returns:
      The function `evaluate`. A batch is any pytree. A dict may contain `"mask"`, bool, of the same
      shape as the values; False marks padding, so that all batches have one shape and the program
      is compiled once. Sums within a batch are float32; the sum over batches is float64, on the
      host.

    Raises:
      TypeError: when called, if a mask is not bool.
      ValueError: when called, if there is no unmasked example, or if the shapes of the mask and the
        values differ.

    >>> evaluate = make_evaluate(lambda params, batch: {"positive": batch["x"] > params})
    >>> batches = [{"x": jnp.array([1.0, 2.0, -5.0]), "mask": jnp.array([True, True, False])}]
    >>> evaluate(0.0, batches)
    {'positive': 1.0}
    """
    to_compute = get_precision(policy).cast_to_compute

    @jax.jit
    def sums(
        params: PyTree, batch: PyTree, **extras: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        mask = batch.get("mask") if isinstance(batch, Mapping) else None
        if mask is not None and getattr(mask, "dtype", None) != jnp.bool_:
            given = f"has dtype {mask.dtype}" if hasattr(mask, "dtype") else "is not an array"
            raise TypeError(
                f"the mask {given}; expected an array of bool, such as mask != 0, that says which "
                "examples count"
            )
        batch = to_compute(batch)
        values = metrics_fn(to_compute(params), batch, **extras)
        values = {name: value.astype(jnp.float32) for name, value in values.items()}
        if mask is None:
            mask = jnp.ones_like(next(iter(values.values())), bool)
        for name, value in values.items():
            if value.shape != mask.shape:
                raise ValueError(
                    f"metric {name!r} has shape {value.shape}; expected that of the mask, {mask.shape}"
                )
        # `where` drops padding; multiplication would not, because 0 times NaN is NaN.
        return mask.sum(), {k: jnp.where(mask, v, 0.0).sum() for k, v in values.items()}

    def evaluate(
        params: PyTree, batches: Iterable[PyTree], model_state: PyTree = None
    ) -> dict[str, float]:
        extras = {} if model_state is None else {"model_state": model_state}
        parts = [sums(params, batch, **extras) for batch in batches]
        parts = jax.device_get(parts)
        count = sum(int(n) for n, _ in parts)
        if count == 0:
            raise ValueError("the evaluation data has no examples; expected at least one")
        return {name: sum(float(v[name]) for _, v in parts) / count for name in parts[0][1]}

    return evaluate
