"""Loss scaling as pure state machines: none, static, dynamic.

float16 flushes gradients below 2^-24 to zero. Multiplying the loss by a scale moves every gradient
up by the same factor, and dividing the gradients by it in float32 moves them back (Micikevicius et
al. 2018, "Mixed Precision Training", section 3.2). A dynamic scale grows while gradients stay
finite and backs off when they do not.

The three classes have one interface: `scale(tree)`, `unscale(tree)`, `adjust(grads_finite)`, each
pure. Moving numbers are pytree leaves, hyper-parameters are static, and all of them survive jit,
`tree_map` and `scan`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jmp_train.numerics.dtypes import at_least_float32, is_floating

T = TypeVar("T")


def _scale_tree(tree: T, operation: Any, scale: Any) -> T:
    """Applies `operation(x, scale)` to floating and complex leaves, in float32 or wider."""

    def apply(x: Any) -> Any:
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return operation(x.astype(at_least_float32(x.dtype)), scale)

    return jax.tree.map(apply, tree)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NoOpLossScale:
    """No loss scaling: for float32 and bfloat16, whose exponents have the same 8 bits."""

    @property
    def loss_scale(self) -> int:
        """The scale: always 1."""
        return 1

    def scale(self, tree: T) -> T:
        """The tree itself."""
        return tree

    def unscale(self, tree: T) -> T:
        """The tree itself."""
        return tree

    def adjust(self, grads_finite: Any) -> NoOpLossScale:
        """The same state."""
        del grads_finite
        return self


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StaticLossScale:
    """A constant loss scale.

    Attributes:
      loss_scale: the factor, a number; kept static, so it has no pytree leaves.

    Raises:
      ValueError: for a factor that is not above 0, finite and normal in float32; for 0, which jmp
        constructs, only from what is to scale a loss with it.
      TypeError: for what is no number.

    >>> StaticLossScale(2.0**10).unscale({"g": jnp.float16(2.0)})
    {'g': Array(0.00195312, dtype=float32)}
    """

    loss_scale: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_scale", _static_number(self.loss_scale, "loss_scale"))
        if self.loss_scale != 0:  # jmp takes 0; `check_loss_scale` refuses it where it is used
            _check_static_scale(self.loss_scale)

    def scale(self, tree: T) -> T:
        """Multiplies floating leaves, in float32 or wider; the result has that dtype."""
        return _scale_tree(tree, jnp.multiply, self.loss_scale)

    def unscale(self, tree: T) -> T:
        """Divides floating leaves, in float32 or wider; the result has that dtype."""
        return _scale_tree(tree, jnp.divide, self.loss_scale)

    def adjust(self, grads_finite: Any) -> StaticLossScale:
        """The same state."""
        del grads_finite
        return self


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class DynamicLossScale:
    """A loss scale that follows the gradients.

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

    With the same numbers this is the trajectory of PyTorch's `GradScaler` (init_scale,
    growth_factor = factor, backoff_factor, growth_interval = period), of Megatron-LM's
    `DynamicGradScaler` (hysteresis), and of jmp. DeepSpeed's `DynamicLossScaler` is the same, but the
    first finite step after an overflow, and of the run, does not count. GradScaler multiplies in
    float64, so a factor that float32 rounds, such as 1.1, may differ from it by a rounding at each
    move, and it has no minimum, so the two part at `min_loss_scale`. Flax's `DynamicScale` grows
    one step later: its `growth_interval=N` is `period=N + 1` here; and where growth would overflow
    it goes to the largest float32, which is no power of two, and the others stay.

    Attributes:
      loss_scale: the scale; shape=(), float32.
      counter: finite steps since the scale last moved or a step was skipped; shape=(), int32.
      period: finite steps before the scale grows.
      factor: what it grows by.
      min_loss_scale: it never backs off below this; where this is 0, not below float32's smallest
        normal number, which XLA would flush to a scale of zero.
      backoff_factor: what a non-finite step multiplies the scale by; `1 / factor` when None.
      max_loss_scale: it never grows above this; when None, float32 is the only limit.
      hysteresis: a budget of non-finite steps: the one that spends it backs off, and so does each
        one after it until the budget is refilled. 1 backs off at once.
      hysteresis_left: what is left of that budget; shape=(), int32; None when hysteresis is 1.
      consecutive_hysteresis: when the budget is refilled: by every finite step, so that only
        non-finite steps in a row spend it, or (False) only when the scale's growth is due.

    Raises:
      ValueError: for a scale, counter, period, factor, limit or hysteresis that cannot work: a scale
        that is not normal in float32, or one that is no scalar, say. Of a traced number the shape
        alone is known.
      TypeError: for what is no number, and for a hyper-parameter that is traced; hyper-parameters are
        static.

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
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("loss_scale", _float32_scalar(self.loss_scale, "loss_scale"))
        _warn_if_not_floating(self.min_loss_scale, "min_loss_scale")
        for name in self._STATIC:
            if getattr(self, name) is not None:
                put(name, _static_number(getattr(self, name), name))
        for name in ("period", "hysteresis"):
            put(name, _whole_number(getattr(self, name), name))
        put("consecutive_hysteresis", bool(self.consecutive_hysteresis))
        if self.max_loss_scale == math.inf:
            put("max_loss_scale", None)
        self._check()
        if self.hysteresis > 1 and self.hysteresis_left is None:
            put("hysteresis_left", self.hysteresis)
        put("counter", _int32_scalar(self.counter, "counter", 2**31 - 1))
        if self.hysteresis_left is not None:
            left = _int32_scalar(self.hysteresis_left, "hysteresis_left", self.hysteresis)
            put("hysteresis_left", left)

    def _check(self) -> None:
        # Written as `not (valid)`, which a NaN fails.
        check_scale(_known(self.loss_scale), "loss_scale")
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
                f"max_loss_scale {self.max_loss_scale} is below min_loss_scale {self.min_loss_scale}; "
                "expected at least that"
            )

    @property
    def exhausted(self) -> jax.Array:
        """Whether a non-finite step would find the budget spent and the scale at its minimum, so
        that it could not back off; bool of shape (). DeepSpeed ends the run at such a step
        (`raise_error_at_min_scale`)."""
        at_minimum = jnp.asarray(self.loss_scale) <= self.lowest
        left = self.hysteresis_left
        return at_minimum if left is None else at_minimum & (left <= 1)

    @property
    def lowest(self) -> float:
        """The smallest scale that it backs off to."""
        return max(self.min_loss_scale, float(np.finfo(np.float32).tiny))

    def scale(self, tree: T) -> T:
        """Multiplies floating leaves, in float32 or wider; the result has that dtype."""
        return _scale_tree(tree, jnp.multiply, self.loss_scale)

    def unscale(self, tree: T) -> T:
        """Divides floating leaves, in float32 or wider; the result has that dtype."""
        return _scale_tree(tree, jnp.divide, self.loss_scale)

    def adjust(self, grads_finite: Any) -> DynamicLossScale:
        """The next state.

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
        # A scale that starts below the minimum is raised to it by the first overflow, as in jmp.
        reduced = jnp.maximum(reduced, self.lowest)

        left = self.hysteresis_left
        if left is not None:
            left_after_skip = jnp.maximum(left - 1, 0)
            reduced = jnp.where(left_after_skip == 0, reduced, scale)
            refilled = due | self.consecutive_hysteresis
            left_after_step = jnp.where(refilled, self.hysteresis, left)
            left = jnp.where(finite, left_after_step, left_after_skip).astype(jnp.int32)

        counter = jnp.where(finite & ~due, jnp.asarray(self.counter) + 1, 0).astype(jnp.int32)
        # Not by the constructor: it would wait for the numbers, to look at them.
        _, static = self.tree_flatten_with_keys()
        return self.tree_unflatten(static, (jnp.where(finite, grown, reduced), counter, left))

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        leaves = ("loss_scale", "counter", "hysteresis_left")
        children = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in leaves]
        return children, tuple(getattr(self, name) for name in self._STATIC)

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: Any) -> DynamicLossScale:
        # Leaves may be anything (tracers, shapes, object()), so nothing is checked or converted.
        self = object.__new__(cls)
        names = ("loss_scale", "counter", "hysteresis_left", *cls._STATIC)
        for name, value in zip(names, (*leaves, *static), strict=True):
            object.__setattr__(self, name, value)
        return self


LossScale = NoOpLossScale | StaticLossScale | DynamicLossScale


def check_loss_scale(loss_scale: Any) -> None:
    """Raises TypeError for what is no `LossScale`, and ValueError for a static one of 0."""
    if isinstance(loss_scale, StaticLossScale):
        _check_static_scale(loss_scale.loss_scale)
    if isinstance(loss_scale, LossScale):
        return
    number = isinstance(loss_scale, (int, float, np.number)) and not isinstance(loss_scale, bool)
    nearest = f"StaticLossScale({loss_scale})" if number else "DynamicLossScale(2.0**16)"
    raise TypeError(f"loss_scale is {loss_scale!r}; expected a loss scale such as {nearest}")


def _static_number(value: Any, name: str) -> float:
    """A hashable Python number out of a number or a concrete scalar array.

    A float, because JAX reads a Python integer as an int32 and refuses 2**32.
    """
    if isinstance(value, Tracer):
        raise TypeError(f"{name} is traced; expected a number, because it is static under jit")
    array = np.asarray(value)
    if array.size != 1 or not (is_floating(array.dtype) or array.dtype.kind in "iub"):
        raise TypeError(f"{name} is {value!r}; expected a number")
    return float(array.item())


def _whole_number(value: float, name: str) -> int:
    if not value.is_integer():
        raise ValueError(f"{name} is {value}; expected a whole number of steps")
    return int(value)


def check_scale(value: Any, name: str) -> None:
    """Raises ValueError for a number that no loss can be scaled by in float32; None is not known."""
    # XLA flushes what is below the smallest normal number to zero.
    tiny = np.finfo(np.float32).tiny
    if value is not None and not tiny <= value < math.inf:
        raise ValueError(
            f"{name} is {value}; expected 0 < it < inf, and at least {tiny:.3g}, the smallest "
            "normal number of float32"
        )


def _check_static_scale(value: float) -> None:
    with np.errstate(over="ignore"):  # an infinite scale is refused
        check_scale(float(np.float32(value)), "loss_scale")


def _float32_scalar(value: Any, name: str) -> Any:
    """Python and NumPy numbers as a float32 array: a weakly typed scale would multiply a float16
    loss in float16, where 65,536 is infinite."""
    _warn_if_not_floating(value, name)
    value = _scalar(
        value, name, "a number", lambda dtype: is_floating(dtype) or dtype.kind in "iub"
    )
    if isinstance(value, jax.Array):
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))
    with np.errstate(over="ignore"):  # an infinite scale is refused
        return np.asarray(value, np.float32)


def _int32_scalar(value: Any, name: str, highest: int) -> Any:
    """A Python integer as an int32 array: weakly typed, it would make the second step recompile."""
    value = _scalar(value, name, "a whole number", lambda dtype: dtype.kind in "iu")
    known = _known(value)
    if known is not None and not 0 <= known <= highest:
        raise ValueError(f"{name} is {known}; expected 0 to {highest}")
    return value if isinstance(value, jax.Array) else np.asarray(value, np.int32)


def _scalar(value: Any, name: str, expected: str, fits: Callable[[np.dtype], bool]) -> Any:
    """A JAX array as it is, traced or not, and anything else as a NumPy array, of shape ()."""
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if not fits(array.dtype) and type(value) is not int:  # NumPy holds 2**64 as an object
        given = f"of {array.dtype}" if isinstance(value, jax.Array) else repr(value)
        raise TypeError(f"{name} is {given}; expected {expected}")
    if array.shape != ():
        raise ValueError(f"{name} has shape {array.shape}; expected a scalar, of shape ()")
    return array


def _known(value: Any) -> Any:
    """The number in an array of shape (), where it is there to be read; else None."""
    if isinstance(value, Tracer):
        return None
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None
    return np.asarray(value)[()]


def _warn_if_not_floating(value: Any, name: str) -> None:
    dtype = getattr(value, "dtype", None)
    if dtype is not None and not is_floating(dtype):
        warnings.warn(f"Expected floating type for {name}, got {dtype}", stacklevel=4)


def largest_power_of_two(dtype: Any) -> float:
    """The largest power of two that a floating dtype represents.

    >>> largest_power_of_two(jnp.float16)
    32768.0
    """
    return 2.0 ** (math.frexp(float(jnp.finfo(dtype).max))[1] - 1)
