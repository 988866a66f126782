"""Gradient accumulation over micro-batches and over the devices of a mesh axis."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train.numerics.dtypes import at_least_float32, parse_dtype
from jmp_train.tree import path_names
from jmp_train.types import DTypeLike, PyTree

# `optax.microbatch` also splits a batch, but passes its function neither the index of the
# micro-batch, which a dropout key needs, nor the model state after the previous micro-batch.

_REDUCE_DTYPES = ("float64", "float32", "bfloat16", "float16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedLoss:
    """A loss that is a weighted mean, for micro-batches or devices with unequal weights.

    A loss function returns a `WeightedLoss` instead of a scalar, for example
    `WeightedLoss(sum of the token losses, number of tokens)`. The loss is then `total / weight`.
    Over micro-batches and devices, the loss is the sum of the totals divided by the sum of the
    weights, and the gradients are those of that quotient: the same as for one large batch. A mean
    of the parts' means would give more weight to a token of a part with few tokens.

    The loss function does not divide, because a part without tokens would be 0 / 0. A part of
    weight 0 still contributes its total. Weights may therefore have either sign, and every split
    of a batch gives the same loss. If the weights of the whole batch sum to 0, the loss is the sum
    of the totals: a batch without tokens has a loss and gradients of zero. Non-finite totals and
    weights propagate to the loss, also from parts of weight 0.

    Attributes:
      total: the weighted sum; a real scalar, preferably float32.
      weight: a scalar, integer or float32, treated as a constant in differentiation. A 16-bit
        floating weight is refused, because a count of tokens would be rounded.

    >>> WeightedLoss(jnp.float32(6), jnp.int32(3)).total
    Array(6., dtype=float32)
    """

    total: Any
    weight: Any


class Weights(NamedTuple):
    """Weights of one part; each has shape=() and is float32 or wider."""

    local: jax.Array  # of this micro-batch on this device
    total: jax.Array  # of this micro-batch on all devices
    divisor: jax.Array  # the part's loss is its total divided by this


class Part(NamedTuple):
    """Result of one micro-batch on one device."""

    loss: jax.Array  # shape=(), in the dtype that the loss function returned
    weights: Any  # `Weights` of a `WeightedLoss`; None if all parts have the same weight
    grads: PyTree  # of `loss`, scaled; at least float32
    aux: PyTree


def mean_of(loss: Any, axis_name: str | None, *, whole: bool) -> tuple[Any, Weights | None]:
    """Return the mean of a `WeightedLoss` and its weights; for any other loss, the loss and None.

    The division comes before the backward pass, because the gradients of a sum over 10^5 tokens
    would be 10^5 times closer to the limit of float16. The divisor is the mean weight over the
    devices, not the weight of one device, so that the gradient of a loss function that reduces over
    the devices itself is correct.

    Args:
      loss: the value that the loss function returned.
      axis_name: mesh axis of the devices; None for one device.
      whole: whether this is the whole batch. The divisor of a part is at least 1, and `combine`
        corrects for that: where positive and negative weights nearly cancel within one part,
        division by their sum would make the gradients overflow float16.

    Raises:
      TypeError: if the weight is not a real scalar or has a 16-bit floating dtype, or if the total
        does not have a real floating dtype.
    """
    if not isinstance(loss, WeightedLoss):
        return loss, None
    total, local = jnp.asarray(loss.total), jnp.asarray(loss.weight)
    if local.shape != () or jnp.issubdtype(local.dtype, jnp.complexfloating):
        raise TypeError(
            f"the weight has shape {local.shape} and dtype {local.dtype}; expected a real scalar"
        )
    if jnp.issubdtype(local.dtype, jnp.floating) and jnp.finfo(local.dtype).bits < 32:
        raise TypeError(
            f"the weight has dtype {local.dtype}, in which a count is rounded or overflows; expected "
            "float32 or an integer, such as jnp.sum(mask, dtype=jnp.float32), or a mask of bools"
        )
    if not jnp.issubdtype(total.dtype, jnp.floating):
        raise TypeError(
            f"the total of the weighted loss has dtype {total.dtype}; expected a real floating dtype"
        )
    dtype = at_least_float32(total.dtype)
    local = jax.lax.stop_gradient(local.astype(dtype))
    weight, devices = local, 1
    if axis_name is not None:
        weight, devices = jax.lax.psum((local, 1), axis_name)
    divisor = weight / devices
    divisor = _or_one(divisor) if whole else jnp.maximum(jnp.abs(divisor), 1)
    # A finite total divided by an infinite weight would be a finite 0.
    divisor = jnp.where(jnp.isfinite(weight), divisor, jnp.nan)
    return total.astype(dtype) / divisor, Weights(local, weight, divisor)


def combine(
    run: Callable[[PyTree, dict[str, Any]], Part],
    params: PyTree,
    batch: PyTree,
    kwargs: dict[str, Any],
    *,
    micro_batches: int,
    axis_name: str | None,
    reduce_dtype: DTypeLike | None,
) -> tuple[Part, np.dtype]:
    """Return the result of a whole batch, with scaled gradients, and the loss dtype of its parts.

    Args:
      run: `run(micro_batch, kwargs)` returns a `Part`.
      params: parameters that `run` differentiates by.
      batch: the whole batch, or the share of this device.
      kwargs: keyword arguments for `run`. `key` is folded with the index of the part;
        `model_state` is passed from each micro-batch to the next.
      micro_batches: number of micro-batches.
      axis_name: mesh axis of the devices, inside a `shard_map` over it; None for one device.
      reduce_dtype: dtype of the sum of gradients over the devices; None for the gradients' dtype.
    """
    rows = interleave(batch, micro_batches)
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * micro_batches
    stateful = kwargs.get("model_state") is not None

    def body(carry: PyTree, number: Any) -> PyTree:
        grads, model_state = carry
        extras = dict(kwargs)
        if kwargs.get("key") is not None:
            extras["key"] = jax.random.fold_in(kwargs["key"], first + number)
        if stateful:
            extras["model_state"] = model_state
        part = run(micro_batch(rows, number), extras)
        aux = part.aux
        if stateful:
            aux, new = part.aux
            model_state = as_before(new, model_state)
        added = part.grads
        if part.weights is not None:
            added = jax.tree.map(lambda g: g * _as_real(part.weights.divisor, g), added)
        grads = added if grads is None else jax.tree.map(jnp.add, grads, added)
        return (grads, model_state), part._replace(grads=None, aux=aux)

    model_state = kwargs.get("model_state")
    if micro_batches == 1:
        carry, parts = body((None, model_state), 0)
        parts = jax.tree.map(lambda x: jnp.asarray(x)[None], parts)
    else:
        # Made from the parameters, so that under explicit sharding the sum has the same sharding.
        zeros = jax.tree.map(
            lambda p: jnp.zeros_like(p, dtype=at_least_float32(jnp.result_type(p))), params
        )
        numbers = jnp.arange(micro_batches, dtype=jnp.int32)
        carry, parts = jax.lax.scan(body, (zeros, model_state), numbers)
    grads, model_state = carry

    devices = 1 if axis_name is None else jax.lax.psum(1, axis_name)
    whole = _whole(parts, devices * micro_batches)

    def summed(x: jax.Array) -> jax.Array:
        return x.sum() if axis_name is None else jax.lax.psum(x.sum(), axis_name)

    def reduced(g: jax.Array) -> jax.Array:
        # Division comes first, because a sum of weighted gradients may overflow the reduce dtype.
        g = g / _as_real(whole.divisor, g)
        if axis_name is None:
            return g
        narrow = g.dtype
        if reduce_dtype is not None and not jnp.issubdtype(g.dtype, jnp.complexfloating):
            narrow = reduce_dtype
        return jax.lax.psum(g.astype(narrow), axis_name).astype(g.dtype)

    def metric(x: jax.Array) -> jax.Array:
        if x.ndim != 1 or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        # `where` drops the metric of a part of weight 0, which is often 0 / 0.
        wide = jnp.where(whole.of_metric == 0, 0, x.astype(at_least_float32(x.dtype)))
        return (summed(wide * whole.of_metric) / whole.metric_divisor).astype(x.dtype)

    aux = jax.tree.map(metric, parts.aux)
    if stateful:
        aux = aux, _mean_over_devices(model_state, axis_name)
    loss = summed(parts.loss.astype(whole.of_loss.dtype) * whole.of_loss) / whole.divisor
    return Part(loss, None, jax.tree.map(reduced, grads), aux), parts.loss.dtype


class _Whole(NamedTuple):
    """Weights of sums over the parts, shape (parts,), and divisors of the sums, shape ()."""

    of_loss: jax.Array
    divisor: jax.Array
    of_metric: jax.Array
    metric_divisor: jax.Array


def _whole(parts: Part, count: int) -> _Whole:
    """Return the weights of a batch of `count` parts, of which this device computed `parts`.

    A metric is a mean weighted like the loss; if the weights of the batch sum to 0, a plain mean.
    """
    wide = at_least_float32(parts.loss.dtype)
    ones, number = jnp.ones(parts.loss.shape, wide), jnp.asarray(count, wide)
    if parts.weights is None:
        return _Whole(ones, number, ones, number)
    total = parts.weights.total.sum()
    of_metric, metric_divisor = jax.tree.map(
        lambda a, b: jnp.where(total == 0, a, b), (ones, number), (parts.weights.local, total)
    )
    return _Whole(parts.weights.divisor, _or_one(total), of_metric, metric_divisor)


def check_batch(batch: PyTree, parts: int, meaning: str) -> None:
    """Raise ValueError if a leaf of a batch cannot be split into `parts` equal parts."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError(f"the batch has no arrays; expected at least one to split into {meaning}")
    sizes = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if np.ndim(leaf) == 0:
            raise ValueError(
                f"batch leaf {name!r} is a scalar; expected a leading axis of examples, to be split "
                f"into {meaning}; pass a value that all examples share outside the batch"
            )
        sizes[name] = np.shape(leaf)[0]
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"batch leaves differ in the size of their leading axis: {sizes}; expected one size"
        )
    size = next(iter(sizes.values()))
    if size % parts:
        raise ValueError(
            f"the batch has {size} examples; expected a multiple of {parts}, to be split into "
            f"{meaning}"
        )


def interleave(batch: PyTree, micro_batches: int) -> PyTree:
    """Reshape the leading axis B of each leaf to (B / micro_batches, micro_batches).

    The first of the two axes keeps the sharding of the batch. If the axis of micro-batches came
    first, it would inherit the sharding, and each device would gather and compute every micro-batch
    in full.

    Raises:
      ValueError: if the batch does not split into equal micro-batches, on each device of a sharded
        axis.
    """
    check_batch(batch, micro_batches, f"{micro_batches} micro-batches")

    def cut(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        _check_sharding(x, micro_batches)
        return jnp.reshape(x, (x.shape[0] // micro_batches, micro_batches, *x.shape[1:]))

    return jax.tree.map(cut, batch)


def micro_batch(rows: PyTree, number: Any) -> PyTree:
    """Return micro-batch n of N from the result of `interleave`: rows n, n + N, n + 2 N, ..."""
    take = functools.partial(jax.lax.dynamic_index_in_dim, index=number, axis=1, keepdims=False)
    return jax.tree.map(take, rows)


def _check_sharding(x: jax.Array, micro_batches: int) -> None:
    """Raise ValueError if an explicitly sharded batch does not split evenly on each device."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[0] if sharding.spec else None
    names = (names,) if isinstance(names, str) else names or ()
    devices = math.prod(sharding.mesh.shape[name] for name in names)
    if x.shape[0] % (devices * micro_batches):
        raise ValueError(
            f"the batch has {x.shape[0]} examples, sharded over {devices} devices; expected a "
            f"multiple of {devices * micro_batches}, to be split into {micro_batches} micro-batches"
        )


def check_micro_batches(micro_batches: Any) -> int:
    """Return the number of micro-batches as an int.

    Raises:
      ValueError: if it is not a whole number of at least 1.
    """
    try:
        if operator.index(micro_batches) >= 1:
            return operator.index(micro_batches)
    except TypeError:
        pass
    raise ValueError(f"micro_batches is {micro_batches!r}; expected a whole number of at least 1")


def check_reduce_dtype(reduce_dtype: DTypeLike | None, axis_name: str | None) -> np.dtype | None:
    """Return the dtype that gradients are summed in over devices; None for None.

    Raises:
      ValueError: if gradients cannot be summed in the dtype, or if there is no axis to reduce over.
    """
    if reduce_dtype is None:
        return None
    if axis_name is None:
        raise ValueError(
            f"reduce_dtype is {reduce_dtype!r} without an axis to reduce over; expected an axis_name too"
        )
    dtype = parse_dtype(reduce_dtype)
    if dtype.name not in _REDUCE_DTYPES:
        raise ValueError(
            f"reduce_dtype is {reduce_dtype!r}; expected one of {', '.join(_REDUCE_DTYPES)}"
        )
    return dtype


def _as_real(x: Any, g: jax.Array) -> jax.Array:
    """Return a real scalar in the real dtype of a gradient, so that products keep its dtype."""
    return jnp.asarray(x, jnp.finfo(g.dtype).dtype)


def _or_one(weight: jax.Array) -> jax.Array:
    return jnp.where(weight == 0, 1, weight)


def as_before(new: PyTree, old: PyTree) -> PyTree:
    """Cast a new model state to the dtypes of the old one.

    The checks use structures, shapes and dtypes only, so they add nothing to the compiled step.

    Raises:
      TypeError: if structure or shape differ, or if a leaf has another kind of dtype (floating
        instead of integer, for example), with the path of the leaf.
    """
    if jax.tree.structure(new) != jax.tree.structure(old):
        names, expected = path_names(new), path_names(old)
        other = [
            *(f"no {name!r}" for name in expected if name not in names),
            *(f"an extra {name!r}" for name in names if name not in expected),
        ]
        raise TypeError(
            f"the loss function returned a model state with {', '.join(other)}; expected the "
            f"structure of its argument model_state, with {', '.join(map(repr, expected))}"
            if other
            else f"the loss function returned the model state {jax.tree.structure(new)}; expected "
            f"the structure of its argument model_state, {jax.tree.structure(old)}"
        )

    def leaf(name: str, new: PyTree, old: PyTree) -> jax.Array:
        new, old = jnp.asarray(new), jnp.asarray(old)
        keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in (new, old)]
        same_kind = new.dtype == old.dtype if any(keys) else _kind(new) == _kind(old)
        if new.shape != old.shape or not same_kind:
            raise TypeError(
                f"the loss function returned the model state {name!r} with shape {new.shape} and "
                f"dtype {new.dtype}; expected shape {old.shape} and dtype {old.dtype}"
            )
        return new if any(keys) else new.astype(old.dtype)

    return jax.tree.map(
        leaf, jax.tree.unflatten(jax.tree.structure(old), path_names(old)), new, old
    )


def _kind(x: jax.Array) -> type:
    """Return the kind of an array's dtype, which a cast to another dtype must not change."""
    kinds = (jnp.bool_, jnp.signedinteger, jnp.unsignedinteger, jnp.floating, jnp.complexfloating)
    return next(kind for kind in kinds if jnp.issubdtype(x.dtype, kind))


def _mean_over_devices(tree: PyTree, axis_name: str | None) -> PyTree:
    if axis_name is None:
        return tree
    return jax.tree.map(
        lambda x: jax.lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
