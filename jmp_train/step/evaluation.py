"""Metrics over a whole data set, from one compiled program and per-example values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jmp_train.policy.policy import Policy
from jmp_train.policy.precision import Precision, get_precision
from jmp_train.policy.rules import Rules


def make_evaluate(
    metrics_fn: Callable[..., dict[str, jax.Array]],
    policy: str | Policy | Rules | Precision | None = "float32",
) -> Callable[..., dict[str, float]]:
    """Makes `evaluate(params, batches, model_state=None) -> {name: mean over the examples}`.

    Args:
      metrics_fn: `metrics_fn(params, batch)`, called with `model_state=` too where there is one,
        returns one value per example for each metric: shape (batch,), floating or bool; or several,
        such as one for each token, all metrics of one shape. It sees parameters and batch in the
        policy's compute dtype.
      policy: what `get_precision` takes; `Rules` and None cast nothing.

    Returns:
      The function. A batch is any pytree; a dict may hold `"mask"`, bool, in the shape of the values: false marks
      padding, so that every batch has one shape and the program compiles once. Sums over a batch are float32, the
      sum over batches is float64 on the host.

    Raises:
      TypeError: when called, for a mask that is not bool.
      ValueError: when called, if no example is left to average over, or if the mask's shape is
        not that of the values.

    >>> evaluate = make_evaluate(lambda params, batch: {"positive": batch["x"] > params})
    >>> batches = [{"x": jnp.array([1.0, 2.0, -5.0]), "mask": jnp.array([True, True, False])}]
    >>> evaluate(0.0, batches)
    {'positive': 1.0}
    """
    to_compute = get_precision(policy).cast_to_compute

    @jax.jit
    def sums(params: Any, batch: Any, **extras: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        mask = batch.get("mask") if isinstance(batch, Mapping) else None
        if mask is not None and getattr(mask, "dtype", None) != jnp.bool_:
            given = f"has dtype {mask.dtype}" if hasattr(mask, "dtype") else "is no array"
            raise TypeError(
                f"the mask {given}; expected an array of bool, such as mask != 0: it says which "
                "examples count, and is not a weight"
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
        # Padding is selected away, not multiplied: 0 times a NaN would be a NaN.
        return mask.sum(), {k: jnp.where(mask, v, 0.0).sum() for k, v in values.items()}

    def evaluate(params: Any, batches: Iterable[Any], model_state: Any = None) -> dict[str, float]:
        extras = {} if model_state is None else {"model_state": model_state}
        parts = [sums(params, batch, **extras) for batch in batches]
        parts = jax.device_get(parts)
        count = sum(int(n) for n, _ in parts)
        if count == 0:
            raise ValueError("the evaluation data holds no example; expected at least one")
        return {name: sum(float(v[name]) for _, v in parts) / count for name in parts[0][1]}

    return evaluate
