"""Loss scaling as pure state machines: none, static, dynamic.

float16 flushes gradients below 2^-24 to zero. A loss multiplied by a scale has gradients that are
larger by the same factor; they are divided by it in float32 (Micikevicius et al. 2018, "Mixed
Precision Training", section 3.2). A dynamic scale grows while gradients stay finite and backs off
when they overflow.

The three classes have the same pure methods: `scale(tree)`, `unscale(tree)` and
`adjust(grads_finite)`. Numbers that change are pytree leaves, hyper-parameters are static, and all
of them survive jit, `tree_map` and `scan`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train.loss_scales.checks import (
    check_scale,
    check_static_scale,
    float32_scalar,
    int32_scalar,
    known,
    static_number,
    warn_if_not_floating,
    whole_number,
)
from jmp_train.numerics.dtypes import at_least_float32
from jmp_train.types import DTypeLike, PyTree

T = TypeVar("T")


def _scale_tree(tree: T, operation: Any, scale: Any) -> T:
    """Apply `operation(x, scale)` to floating and complex leaves, in float32 or wider."""

    def apply(x: Any) -> Any:
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return operation(x.astype(at_least_float32(x.dtype)), scale)

    return jax.tree.map(apply, tree)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NoOpLossScale:
    """No loss scaling, for float32 and bfloat16, which both have 8 exponent bits."""

    @property
    def loss_scale(self) -> int:
        """Return 1, the constant scale."""
        return 1

    def scale(self, tree: T) -> T:
        """Return the tree unchanged."""
        return tree

    def unscale(self, tree: T) -> T:
        """Return the tree unchanged."""
        return tree

    def adjust(self, grads_finite: Any) -> NoOpLossScale:
        """Return the same state."""
        del grads_finite
        return self


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StaticLossScale:
    """A constant loss scale.

    Attributes:
      loss_scale: the factor, a number. It is static, so the class has no pytree leaves.

    Raises:
      ValueError: for a factor that is negative, infinite or not normal in float32. A factor of 0,
        which jmp accepts, raises only when it is used (`check_loss_scale`).
      TypeError: for a value that is not a number.

    >>> StaticLossScale(2.0**10).unscale({"g": jnp.float16(2.0)})
    {'g': Array(0.00195312, dtype=float32)}
    """

    loss_scale: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_scale", static_number(self.loss_scale, "loss_scale"))
        if self.loss_scale != 0:  # jmp accepts 0; `check_loss_scale` refuses it where it is used
            check_static_scale(self.loss_scale)

    def scale(self, tree: T) -> T:
        """Multiply floating leaves by the scale, in float32 or wider; the result has that dtype."""
        return _scale_tree(tree, jnp.multiply, self.loss_scale)

    def unscale(self, tree: T) -> T:
        """Divide floating leaves by the scale, in float32 or wider; the result has that dtype."""
        return _scale_tree(tree, jnp.divide, self.loss_scale)

    def adjust(self, grads_finite: Any) -> StaticLossScale:
        """Return the same state."""
        del grads_finite
        return self


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class DynamicLossScale:
    """A loss scale that adapts to the gradients.

    After `period` finite steps in a row the scale is multiplied by `factor`; a non-finite step
    multiplies it by `backoff_factor` at once and starts the count again:

        if grads_finite:
            counter += 1
            if counter == period or consecutive_hysteresis:
                hysteresis_left = hysteresis
            if counter == period:
                counter = 0
                if loss_scale * factor is finite:
                    loss_scale = min(loss_scale * factor, max_loss_scale)
        else:
            counter = 0
            hysteresis_left = max(hysteresis_left - 1, 0)
            if hysteresis_left == 0:
                loss_scale = max(loss_scale * backoff_factor, min_loss_scale)

    With equal numbers the scale moves as in PyTorch's `GradScaler` (init_scale, growth_factor =
    factor, backoff_factor, growth_interval = period), Megatron-LM's `DynamicGradScaler`
    (hysteresis) and jmp. Differences from other libraries:

    - GradScaler multiplies in float64. With a factor that float32 rounds, such as 1.1, the two may
      differ by one rounding at each move. GradScaler has no `min_loss_scale`.
    - DeepSpeed's `DynamicLossScaler` does not count the first finite step of the run, nor the first
      one after an overflow.
    - Flax's `DynamicScale` grows one step later: its `growth_interval=N` is `period=N + 1` here.
      Where growth would overflow, it moves to the largest float32, which is not a power of two; the
      others keep their scale.

    Attributes:
      loss_scale: the scale; shape=(), float32.
      counter: finite steps since the scale last moved or a step was skipped; shape=(), int32.
      period: growth interval, in finite steps.
      factor: growth factor.
      min_loss_scale: smallest scale after a backoff. 0 stands for float32's smallest normal number,
        because XLA flushes smaller ones to zero.
      backoff_factor: factor that a non-finite step multiplies the scale by; `1 / factor` when None.
      max_loss_scale: largest scale after growth; when None, the largest float32.
      hysteresis: budget of non-finite steps. The step that spends it backs off, and so does each
        later one until the budget is refilled. A budget of 1 backs off at once.
      hysteresis_left: remaining budget; shape=(), int32; None when hysteresis is 1.
      consecutive_hysteresis: if True, every finite step refills the budget, so that only
        consecutive non-finite steps spend it; if False, only a step at which growth is due does.

    Raises:
      ValueError: for a number outside its range, such as a scale that is not normal in float32, and
        for an array that is not a scalar. The value of a traced number is not checked.
      TypeError: for a value that is not a number, and for a traced hyper-parameter, because
        hyper-parameters are static.

    >>> state = DynamicLossScale(2.0**15, period=2)
    >>> for finite in (True, True, False):
    ...     state = state.adjust(jnp.array(finite))
    ...     print(float(state.loss_scale), int(state.counter))
    32768.0 1
    65536.0 0
    32768.0 0
    """

    loss_scale: Any
    counter: Any = dataclasses.field(default_factory=lambda: np.zeros([], np.int32))
    period: Any = 2000
    factor: Any = 2
    min_loss_scale: Any = 1.0
    backoff_factor: Any = None
    max_loss_scale: Any = None
    hysteresis: int = 1
    hysteresis_left: Any = None
    consecutive_hysteresis: bool = False

    _STATIC = (
        "period",
        "factor",
        "min_loss_scale",
        "backoff_factor",
        "max_loss_scale",
        "hysteresis",
        "consecutive_hysteresis",
    )

    def __post_init__(self) -> None:
        def put(name: str, value: PyTree) -> None:
            object.__setattr__(self, name, value)  # the dataclass is frozen

        put("loss_scale", float32_scalar(self.loss_scale, "loss_scale"))
        warn_if_not_floating(self.min_loss_scale, "min_loss_scale")
        for name in self._STATIC:
            if getattr(self, name) is not None:
                put(name, static_number(getattr(self, name), name))
        for name in ("period", "hysteresis"):
            put(name, whole_number(getattr(self, name), name))
        put("consecutive_hysteresis", bool(self.consecutive_hysteresis))
        if self.max_loss_scale == math.inf:
            put("max_loss_scale", None)
        self._check()
        if self.hysteresis > 1 and self.hysteresis_left is None:
            put("hysteresis_left", self.hysteresis)
        put("counter", int32_scalar(self.counter, "counter", 2**31 - 1))
        if self.hysteresis_left is not None:
            left = int32_scalar(self.hysteresis_left, "hysteresis_left", self.hysteresis)
            put("hysteresis_left", left)

    def _check(self) -> None:
        # Conditions are written as `not (valid)`, so that a NaN fails them.
        check_scale(known(self.loss_scale), "loss_scale")
        for name in ("period", "hysteresis"):  # their counters are int32 and never wrap
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 to 2147483647 steps")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor is {self.factor}; expected at least 1, such as 2")
        if self.backoff_factor is not None and not 0 < self.backoff_factor <= 1:
            raise ValueError(f"backoff_factor is {self.backoff_factor}; expected 0 < it <= 1")
        if not 0 <= self.min_loss_scale <= float(np.finfo(np.float32).max):
            raise ValueError(
                f"min_loss_scale is {self.min_loss_scale}; expected 0 <= it < inf in float32"
            )
        if self.max_loss_scale is not None and not self.max_loss_scale >= self.min_loss_scale:
            raise ValueError(
                f"max_loss_scale {self.max_loss_scale} is below min_loss_scale "
                f"{self.min_loss_scale}; expected at least that"
            )

    @property
    def exhausted(self) -> jax.Array:
        """Return whether the next non-finite step could not lower the scale; bool of shape ().

        This is so when that step spends the budget and the scale is at its minimum. DeepSpeed ends
        the run at such a step (`raise_error_at_min_scale`).
        """
        at_minimum = jnp.asarray(self.loss_scale) <= self.lowest
        left = self.hysteresis_left
        return at_minimum if left is None else at_minimum & (left <= 1)

    @property
    def lowest(self) -> float:
        """Return the smallest scale after a backoff."""
        return max(self.min_loss_scale, float(np.finfo(np.float32).tiny))

    def scale(self, tree: T) -> T:
        """Multiply floating leaves by the scale, in float32 or wider; the result has that dtype."""
        return _scale_tree(tree, jnp.multiply, self.loss_scale)

    def unscale(self, tree: T) -> T:
        """Divide floating leaves by the scale, in float32 or wider; the result has that dtype."""
        return _scale_tree(tree, jnp.divide, self.loss_scale)

    def adjust(self, grads_finite: Any) -> DynamicLossScale:
        """Return the next state.

        Args:
          grads_finite: whether every gradient of the step was finite; bool of shape ().
        """
        finite = jnp.asarray(grads_finite)
        assert finite.ndim == 0, "expected boolean scalar"
        finite = finite.astype(jnp.bool_)
        scale = jnp.asarray(self.loss_scale)
        scale = scale.astype(at_least_float32(scale.dtype))

        due = self.counter >= self.period - 1
        grown = scale * self.factor
        if self.max_loss_scale is not None:
            grown = jnp.minimum(grown, jnp.maximum(scale, self.max_loss_scale))
        grown = jnp.where(due & jnp.isfinite(grown), grown, scale)

        if self.backoff_factor is None:
            reduced = scale / self.factor
        else:
            reduced = scale * self.backoff_factor
        # As in jmp, the first overflow raises a scale that starts below the minimum to the minimum.
        reduced = jnp.maximum(reduced, self.lowest)

        left = self.hysteresis_left
        if left is not None:
            left_after_skip = jnp.maximum(left - 1, 0)
            reduced = jnp.where(left_after_skip == 0, reduced, scale)
            refilled = due | self.consecutive_hysteresis
            left_after_step = jnp.where(refilled, self.hysteresis, left)
            left = jnp.where(finite, left_after_step, left_after_skip).astype(jnp.int32)

        counter = jnp.where(finite & ~due, jnp.asarray(self.counter) + 1, 0).astype(jnp.int32)
        # The constructor would wait for the numbers in order to check them.
        _, static = self.tree_flatten_with_keys()
        return self.tree_unflatten(static, (jnp.where(finite, grown, reduced), counter, left))

    def tree_flatten_with_keys(self) -> tuple[PyTree, PyTree]:
        leaves = ("loss_scale", "counter", "hysteresis_left")
        children = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in leaves]
        return children, tuple(getattr(self, name) for name in self._STATIC)

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: PyTree) -> DynamicLossScale:
        # Leaves may be tracers, shapes or object(), so nothing is checked or converted.
        self = object.__new__(cls)
        names = ("loss_scale", "counter", "hysteresis_left", *cls._STATIC)
        for name, value in zip(names, (*leaves, *static), strict=True):
            object.__setattr__(self, name, value)
        return self


LossScale = NoOpLossScale | StaticLossScale | DynamicLossScale


def check_loss_scale(loss_scale: Any) -> None:
    """Raise TypeError unless the value is a `LossScale`, and ValueError for a static scale of 0."""
    if isinstance(loss_scale, StaticLossScale):
        check_static_scale(loss_scale.loss_scale)
    if isinstance(loss_scale, LossScale):
        return
    number = isinstance(loss_scale, (int, float, np.number)) and not isinstance(loss_scale, bool)
    suggestion = f"StaticLossScale({loss_scale})" if number else "DynamicLossScale(2.0**16)"
    raise TypeError(f"loss_scale is {loss_scale!r}; expected a loss scale such as {suggestion}")


def largest_power_of_two(dtype: DTypeLike) -> float:
    """Return the largest power of two that a floating dtype represents.

    >>> largest_power_of_two(jnp.float16)
    32768.0
    """
    return 2.0 ** (math.frexp(float(jnp.finfo(dtype).max))[1] - 1)
