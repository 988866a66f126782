"""One gradient from the parts of a batch: micro-batches in turn, and the devices of a mesh axis."""

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

# `optax.microbatch` splits a batch too, but hands its function neither the number of the
# micro-batch, which a dropout key needs, nor the model state that the one before has left.

_REDUCE_DTYPES = ("float64", "float32", "bfloat16", "float16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedLoss:
    """A loss that is a weighted mean, for parts of a batch that do not weigh the same.

    A loss function returns it in place of the loss: `WeightedLoss(sum of the token losses, number
    of tokens)`, for example. The loss is `total / weight`, and over micro-batches and devices the
    sum of the totals divided by the sum of the weights, gradients likewise: what one large batch
    would give. A mean of the parts' means would weigh a token of a short part more.

    The division is left to the caller because a part without a token would be 0 / 0. A part of
    weight 0 still contributes its total, so weights may have either sign, and any split of a batch
    gives the same loss. Where the weights of the whole batch sum to 0, the sum of the totals is the
    loss: a batch without a token has loss and gradients of zero. What is not finite is not hidden,
    whatever its weight.

    Attributes:
      total: the sum; a real scalar, at best in float32.
      weight: a scalar, an integer or in float32; a constant to differentiation. A sum of a mask that
        was cast to 16 bits is refused, because its count would be rounded.

    >>> WeightedLoss(jnp.float32(6), jnp.int32(3)).total
    Array(6., dtype=float32)
    """

    total: Any
    weight: Any


class Weights(NamedTuple):
    """The weights of one part; each of shape=(), float32 or wider."""

    own: jax.Array  # of this micro-batch on this device
    total: jax.Array  # of this micro-batch on all devices
    divisor: jax.Array  # what the part's total was divided by, to give its loss


class Part(NamedTuple):
    """What one micro-batch on one device gives."""

    loss: jax.Array  # shape=(), in its own dtype
    weights: Any  # `Weights` of a `WeightedLoss`; None where parts weigh the same
    grads: Any  # of `loss`, scaled; at least float32
    aux: Any


def mean_of(loss: Any, axis_name: str | None, *, whole: bool) -> tuple[Any, Weights | None]:
    """The mean that a `WeightedLoss` stands for, and its weights.

    Divided before the backward pass, not after: the gradients of a sum over 10^5 tokens would be
    10^5 times nearer to float16's limit. The divisor is the devices' mean weight, not each one's
    own, so that a loss function which itself reduces over the devices differentiates rightly.

    Args:
      loss: as the loss function returned it.
      axis_name: the mesh axis of the devices; None for one device.
      whole: whether this is the whole batch. A part is divided by 1 at least, which `combine` makes
        good: weights that cancel in one part of a batch would make its gradients overflow float16.
    """
    if not isinstance(loss, WeightedLoss):
        return loss, None
    total, own = jnp.asarray(loss.total), jnp.asarray(loss.weight)
    if own.shape != () or jnp.issubdtype(own.dtype, jnp.complexfloating):
        raise TypeError(
            f"the weight has shape {own.shape} and dtype {own.dtype}; expected a real scalar"
        )
    if jnp.issubdtype(own.dtype, jnp.floating) and jnp.finfo(own.dtype).bits < 32:
        raise TypeError(
            f"the weight has dtype {own.dtype}, in which a count is rounded or overflows; expected "
            "float32 or an integer, such as jnp.sum(mask, dtype=jnp.float32), or a mask of bools"
        )
    if not jnp.issubdtype(total.dtype, jnp.floating):
        raise TypeError(
            f"the total of the weighted loss has dtype {total.dtype}; expected a real floating one"
        )
    dtype = at_least_float32(total.dtype)
    own = jax.lax.stop_gradient(own.astype(dtype))
    weight, devices = own, 1
    if axis_name is not None:
        weight, devices = jax.lax.psum((own, 1), axis_name)
    divisor = weight / devices
    divisor = _or_one(divisor) if whole else jnp.maximum(jnp.abs(divisor), 1)
    # Divided by an infinite weight, any total would be a finite 0.
    divisor = jnp.where(jnp.isfinite(weight), divisor, jnp.nan)
    return total.astype(dtype) / divisor, Weights(own, weight, divisor)


def combine(
    run: Callable[[Any, dict[str, Any]], Part],
    params: Any,
    batch: Any,
    kwargs: dict[str, Any],
    *,
    micro_batches: int,
    axis_name: str | None,
    reduce_dtype: Any,
) -> tuple[Part, np.dtype]:
    """The whole batch from its parts, its gradients still scaled; and the parts' loss dtype.

    Args:
      run: gives a part from a micro-batch and keyword arguments.
      params: what the gradients are of.
      batch: this device's, if there are several.
      kwargs: `key` is folded with the number of the part, `model_state` handed from each
        micro-batch to the next.
      micro_batches: how many.
      axis_name: the mesh axis of the devices, inside a `shard_map` over it; None for one device.
      reduce_dtype: what gradients are summed over the devices in.
    """
    rows = interleave(batch, micro_batches)
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * micro_batches
    stateful = kwargs.get("model_state") is not None

    def body(carry: Any, number: Any) -> Any:
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
        # Like the parameters, so that under explicit sharding the sum has their sharding.
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
        # Divided first: a sum of weighted gradients may be beyond the reduce dtype.
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
        # A part without weight is selected away: its own metric is often 0 / 0.
        wide = jnp.where(whole.of_metric == 0, 0, x.astype(at_least_float32(x.dtype)))
        return (summed(wide * whole.of_metric) / whole.metric_divisor).astype(x.dtype)

    aux = jax.tree.map(metric, parts.aux)
    if stateful:
        aux = aux, _mean_over_devices(model_state, axis_name)
    loss = summed(parts.loss.astype(whole.of_loss.dtype) * whole.of_loss) / whole.divisor
    return Part(loss, None, jax.tree.map(reduced, grads), aux), parts.loss.dtype


class _Whole(NamedTuple):
    """What sums over the parts are weighted with, shape (parts,), and divided by, shape ()."""

    of_loss: jax.Array
    divisor: jax.Array
    of_metric: jax.Array
    metric_divisor: jax.Array


def _whole(parts: Part, count: int) -> _Whole:
    """The weights of a batch of `count` parts, of which this device has `parts`.

    A metric is a mean by the parts' weights; where these sum to 0 over the batch, a plain mean.
    """
    wide = at_least_float32(parts.loss.dtype)
    ones, number = jnp.ones(parts.loss.shape, wide), jnp.asarray(count, wide)
    if parts.weights is None:
        return _Whole(ones, number, ones, number)
    total = parts.weights.total.sum()
    of_metric, metric_divisor = jax.tree.map(
        lambda a, b: jnp.where(total == 0, a, b), (ones, number), (parts.weights.own, total)
    )
    return _Whole(parts.weights.divisor, _or_one(total), of_metric, metric_divisor)


def check_batch(batch: Any, parts: int, meaning: str) -> None:
    """Raises ValueError for a batch whose leaves cannot all be split into `parts` equal parts."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError(f"the batch has no arrays; expected some to split into {meaning}")
    sizes = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if np.ndim(leaf) == 0:
            raise ValueError(
                f"batch leaf {name!r} is a scalar; expected a leading axis of examples, to be split "
                f"into {meaning}; give what all examples share to the loss function otherwise"
            )
        sizes[name] = np.shape(leaf)[0]
    if len(set(sizes.values())) > 1:
        raise ValueError(f"batch leaves differ in the size of their leading axis: {sizes}")
    size = next(iter(sizes.values()))
    if size % parts:
        raise ValueError(
            f"the batch has {size} examples; expected a multiple of {parts}, to be split into "
            f"{meaning}"
        )


def interleave(batch: Any, micro_batches: int) -> Any:
    """The leading axis B of each leaf as (B / micro_batches, micro_batches).

    The axis that stays in front is the one that a batch is sharded over. Cut the other way round,
    into consecutive rows, the axis of micro-batches would inherit the sharding, and each device
    would gather and compute every micro-batch in full.
    """
    check_batch(batch, micro_batches, f"{micro_batches} micro-batches")

    def cut(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        _check_sharding(x, micro_batches)
        return jnp.reshape(x, (x.shape[0] // micro_batches, micro_batches, *x.shape[1:]))

    return jax.tree.map(cut, batch)


def micro_batch(rows: Any, number: Any) -> Any:
    """A micro-batch of what `interleave` made: rows number, number + N, number + 2 N, ... of N."""
    take = functools.partial(jax.lax.dynamic_index_in_dim, index=number, axis=1, keepdims=False)
    return jax.tree.map(take, rows)


def _check_sharding(x: jax.Array, micro_batches: int) -> None:
    """Raises ValueError where an explicitly sharded axis of examples has too few for each part."""
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
    """The number, if it is one of at least 1.

    Raises:
      ValueError: if not.
    """
    try:
        if operator.index(micro_batches) >= 1:
            return operator.index(micro_batches)
    except TypeError:
        pass
    raise ValueError(f"micro_batches is {micro_batches!r}; expected a whole number of at least 1")


def check_reduce_dtype(reduce_dtype: Any, axis_name: str | None) -> Any:
    """The dtype that a name stands for, if gradients can be summed in it; None for None.

    Raises:
      ValueError: if not, or if there is no axis to reduce over.
    """
    if reduce_dtype is None:
        return None
    if axis_name is None:
        raise ValueError(
            f"reduce_dtype is {reduce_dtype!r} but nothing is reduced; expected a mesh (make_step) "
            "or an axis_name (value_and_grad)"
        )
    dtype = parse_dtype(reduce_dtype)
    if dtype.name not in _REDUCE_DTYPES:
        raise ValueError(
            f"reduce_dtype is {reduce_dtype!r}; expected one of {', '.join(_REDUCE_DTYPES)}"
        )
    return dtype


def _as_real(x: Any, g: jax.Array) -> jax.Array:
    """A real scalar in the dtype of a gradient's parts, so that the gradient keeps its own."""
    return jnp.asarray(x, jnp.finfo(g.dtype).dtype)


def _or_one(weight: jax.Array) -> jax.Array:
    return jnp.where(weight == 0, 1, weight)


def as_before(new: Any, old: Any) -> Any:
    """A model state as the loss function returned it, in the dtypes of the one that it was given.

    What is checked is known when traced, so that a compiled step is as it would be without.

    Raises:
      TypeError: for another structure or shape, or a number of another kind (floating where it was
        given an integer, say), by its path.
    """
    if jax.tree.structure(new) != jax.tree.structure(old):
        names, expected = path_names(new), path_names(old)
        other = [
            *(f"no {name!r}" for name in expected if name not in names),
            *(f"{name!r} in addition" for name in names if name not in expected),
        ]
        raise TypeError(
            f"the loss function returned a model state with {', '.join(other)}; expected the "
            f"structure that it was given, with {', '.join(map(repr, expected))}"
            if other
            else f"the loss function returned the model state {jax.tree.structure(new)}; expected "
            f"the structure that it was given, {jax.tree.structure(old)}"
        )

    def leaf(name: str, new: Any, old: Any) -> jax.Array:
        new, old = jnp.asarray(new), jnp.asarray(old)
        keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in (new, old)]
        alike = new.dtype == old.dtype if any(keys) else _kind(new) == _kind(old)
        if new.shape != old.shape or not alike:
            raise TypeError(
                f"the loss function returned the model state {name!r} with shape {new.shape} and "
                f"dtype {new.dtype}; expected shape {old.shape} and dtype {old.dtype}, as it was given"
            )
        return new if any(keys) else new.astype(old.dtype)

    return jax.tree.map(
        leaf, jax.tree.unflatten(jax.tree.structure(old), path_names(old)), new, old
    )


def _kind(x: jax.Array) -> type:
    """What a cast may not cross: bool, signed, unsigned, floating and complex numbers."""
    kinds = (jnp.bool_, jnp.signedinteger, jnp.unsignedinteger, jnp.floating, jnp.complexfloating)
    return next(kind for kind in kinds if jnp.issubdtype(x.dtype, kind))


def _mean_over_devices(tree: Any, axis_name: str | None) -> Any:
    if axis_name is None:
        return tree
    return jax.tree.map(
        lambda x: jax.lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
