"""Means of per-example metrics over a data set, with one compiled program."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train.policy.policy import Policy
from jmp_train.policy.precision import Precision, get_precision
from jmp_train.policy.rules import Rules
from jmp_train.types import PyTree

NOTE = "of the metric "  # begins the note of an exception with the name of a metric
_NO_EXAMPLES = "the evaluation data has no examples; expected at least one"


def make_evaluate(
    metrics_fn: Callable[..., dict[str, jax.Array]],
    policy: str | Policy | Rules | Precision | None = "float32",
    *,
    cast_batch: bool = True,
) -> Callable[..., dict[str, float]]:
    """Make `evaluate(params, batches, model_state=None) -> {name: mean over the examples}`.

    Args:
      metrics_fn: `metrics_fn(params, batch)` returns one value per example for each metric: shape
        (batch,), floating or bool; or several values per example, such as one for each token; or a
        pair `(values, weights)`, for the metric sum(values) / sum(weights). If there is a model
        state, `metrics_fn` is called with `model_state=` too. It gets parameters and batch in the
        policy's compute dtype.
      policy: an argument of `get_precision`; `Rules` and None cast nothing.
      cast_batch: whether to cast the floating leaves of the batch to the compute dtype.

    Returns:
      The function `evaluate`. A batch is any pytree. A dict may contain `"mask"`, bool,
      (batch,) or of the shape of the values; False marks padding, so that all batches have one shape
      and the program is compiled once. Values per example under a mask per token count if any token
      of the example does. Sums within a batch are float32; the sum over batches is float64, on the
      host.

    Raises:
      TypeError: when called, if a mask is not bool.
      ValueError: when called, if there is no unmasked example, or if the shapes of the mask and the
        values do not agree.

    >>> evaluate = make_evaluate(lambda params, batch: {"positive": batch["x"] > params})
    >>> batches = [{"x": jnp.array([1.0, 2.0, -5.0]), "mask": jnp.array([True, True, False])}]
    >>> evaluate(0.0, batches)
    {'positive': 1.0}
    """
    sums = jax.jit(make_sums(metrics_fn, policy, cast_batch=cast_batch))

    def evaluate(
        params: PyTree, batches: Iterable[PyTree], model_state: PyTree = None
    ) -> dict[str, float]:
        extras = {} if model_state is None else {"model_state": model_state}
        parts = jax.device_get([sums(params, batch, **extras) for batch in batches])
        if not parts:
            raise ValueError(_NO_EXAMPLES)
        means = {}
        for name in parts[0]:
            total, weight = (sum(float(part[name][i]) for part in parts) for i in (0, 1))
            if weight == 0:
                raise ValueError(_NO_EXAMPLES)
            means[name] = total / weight
        return means

    return evaluate


def make_sums(
    metrics_fn: Callable[..., dict[str, Any]],
    policy: str | Policy | Rules | Precision | None = "float32",
    *,
    cast_batch: bool = True,
) -> Callable[..., dict[str, tuple[jax.Array, jax.Array]]]:
    """Make `sums(params, batch, **extras)`: by metric, the sums of values and weights of a batch.

    Arguments as those of `make_evaluate`, which adds these sums up over the batches.
    """
    to_compute = get_precision(policy).cast_to_compute

    def sums(params: PyTree, batch: PyTree, **extras: Any) -> PyTree:
        mask = batch.get("mask") if isinstance(batch, Mapping) else None
        _check_mask(mask)
        values = metrics_fn(
            to_compute(params), to_compute(batch) if cast_batch else batch, **extras
        )
        result = {}
        for name, value in values.items():
            with naming(name):
                result[name] = weighted_sums(value, mask, name)
        return result

    return sums


@contextlib.contextmanager
def naming(metric: str) -> Iterator[None]:
    """Add the name of a metric to an exception, as a note."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{NOTE}{metric!r}")
        raise


def _check_mask(mask: Any) -> None:
    if mask is not None and getattr(mask, "dtype", None) != jnp.bool_:
        given = f"has dtype {mask.dtype}" if hasattr(mask, "dtype") else "is not an array"
        raise TypeError(
            f"the mask {given}; expected an array of bool, such as mask != 0, that says which "
            "examples count"
        )


def values_and_weights(value: Any, name: str = "loss") -> tuple[jax.Array, jax.Array | None]:
    """Return the values of a metric as an array, and its weights, or None if it has none.

    Raises:
      ValueError: if it is neither an array nor a pair of arrays, and for weights of another shape.
    """
    paired = isinstance(value, tuple) and len(value) == 2
    parts = value if paired else (value,)
    if not all(isinstance(part, (jax.Array, np.ndarray, np.generic, int, float)) for part in parts):
        size = f" of {len(value)}" if isinstance(value, tuple) else ""
        raise ValueError(
            f"metric {name!r} is a {type(value).__name__}{size}; expected an array of one value per "
            "example, or a pair (values, weights)"
        )
    values, weights = map(jnp.asarray, value if paired else (value, 0))
    if not paired:
        return values, None
    if weights.ndim not in (0, values.ndim):
        raise ValueError(
            f"metric {name!r} has values of shape {values.shape} and weights of {weights.shape}; "
            "expected equal shapes"
        )
    return values, weights


def weighted_sums(value: Any, mask: Any = None, name: str = "loss") -> tuple[jax.Array, jax.Array]:
    """Return the sums of the values and of their weights, float32, without what is masked.

    Args:
      value: values, (batch, ...), or a pair of values and weights.
      mask: bool, (batch, ...), which says what counts; None: everything.
      name: name of the metric, for errors.

    Raises:
      TypeError: if the mask is not bool.
      ValueError: if the shapes of the mask and the values do not agree, and as `values_and_weights`.
    """
    _check_mask(mask)
    values, weights = values_and_weights(value, name)
    values = values.astype(jnp.float32)
    weights = jnp.ones((), jnp.float32) if weights is None else weights
    weights = jnp.broadcast_to(weights.astype(jnp.float32), values.shape)
    if mask is None:
        return values.sum(), weights.sum()
    shared = min(mask.ndim, values.ndim)
    if not shared or mask.shape[:shared] != values.shape[:shared]:
        raise ValueError(
            f"metric {name!r} has shape {values.shape}; expected that of the mask, {mask.shape}, or its "
            "first axes: values per example, or a pair (values, weights) of them"
        )
    if mask.ndim > values.ndim:
        mask = mask.any(axis=tuple(range(values.ndim, mask.ndim)))
    mask = mask.reshape(*mask.shape, *[1] * (values.ndim - mask.ndim))
    # `where` drops padding; multiplication would not, because 0 times NaN is NaN.
    return jnp.where(mask, values, 0.0).sum(), jnp.where(mask, weights, 0.0).sum()
