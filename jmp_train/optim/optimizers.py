"""Optimizers that an experiment chooses by name, with a schedule and gradient clipping."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jmp_train.fields import check_fields
from jmp_train.optim.bf16_remainder import bf16_remainder
from jmp_train.optim.fp32_state import fp32_state
from jmp_train.optim.kahan import kahan
from jmp_train.optim.master_weights import master_weights
from jmp_train.optim.stochastic_rounding import stochastic_rounding
from jmp_train.tree import cast_floating
from jmp_train.types import DTypeLike, PyTree


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule and gradient clipping."""

    name: Literal["adamw", "adam", "sgd", "lion", "muon"] = "adamw"
    """Optimizer. Its state is float32 under every policy unless the field state says otherwise."""
    learning_rate: float = 1e-3
    """Peak learning rate; --lr is short for it."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate from its peak to zero by the last step; constant: no decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero to the peak learning rate; must be fewer than --steps."""
    weight_decay: float = 1e-4
    """Decoupled weight decay per unit of learning rate (adamw, lion, muon)."""
    b1: float = 0.9
    """Decay rate of the first moment (adamw, adam); weight of the momentum in the update (lion)."""
    b2: float = 0.999
    """Decay rate of the second moment (adamw, adam) or of the momentum (lion)."""
    eps: float = 1e-8
    """Constant added to the square root of the second moment (adamw, adam)."""
    momentum: float = 0.9
    """Nesterov momentum (sgd); 0 disables it."""
    max_grad_norm: float | None = 1.0
    """Global norm above which unscaled gradients are clipped; None disables clipping."""
    parameters: Literal["direct", "master", "remainder", "stochastic", "kahan"] = "direct"
    """Method for parameters narrower than float32: direct loses small updates; master keeps a
    float32 copy in the optimizer's state; remainder keeps the low 16 bits of each float32 value
    (bfloat16 only); kahan keeps the rounding error; stochastic rounds up or down at random."""
    state: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the optimizer's computation and state. bfloat16 and float16 exist to show what fails
    (docs/parameters.md)."""

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("learning_rate", "eps"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field} is {getattr(self, field)}; expected a number above 0")
        for field in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected 0 <= {field} < 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}; expected 0 or more")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; expected 0 or more")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm is {self.max_grad_norm}; expected a number above 0, or None"
            )


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates made so far.

    Args:
      config: its `learning_rate`, `schedule` and `warmup_steps` are used.
      steps: number of updates in the whole run.

    Raises:
      ValueError: if the warm-up is not shorter than the run; `config.warmup.fit_warmup` shortens
      it.

    >>> schedule = make_schedule(OptimizerConfig(learning_rate=0.1, warmup_steps=10), steps=110)
    >>> [round(float(schedule(n)), 3) for n in (0, 5, 10, 60, 110)]
    [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    if config.warmup_steps >= steps:
        raise ValueError(
            f"optimizer.warmup_steps is {config.warmup_steps}; expected fewer than steps ({steps})"
        )
    peak, rest = config.learning_rate, steps - config.warmup_steps
    schedule = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if config.warmup_steps == 0:
        return schedule
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, schedule], [config.warmup_steps])


def check_parameters(config: OptimizerConfig, param_dtype: DTypeLike) -> None:
    """Check that a method for narrow parameters supports the dtype in which they are stored.

    Args:
      config: its field `parameters` names the method.
      param_dtype: parameter dtype of the policy.

    Raises:
      ValueError: if the method does not support the dtype.

    >>> check_parameters(OptimizerConfig(parameters="remainder"), jnp.float16)
    Traceback (most recent call last):
    ValueError: optimizer.parameters is 'remainder' and the policy stores parameters in float16; \
expected bfloat16 parameters, as in policy 'bf16-true', or 'direct'
    """
    dtype = jnp.dtype(param_dtype)
    if config.parameters == "direct":
        return
    if config.parameters == "remainder":
        supported, expected = dtype == jnp.bfloat16, "bfloat16 parameters, as in policy 'bf16-true'"
    else:
        supported = jnp.finfo(dtype).bits < 32
        expected = "narrower ones, as in policies 'bf16-true' and '16-true'"
    if not supported:
        raise ValueError(
            f"optimizer.parameters is {config.parameters!r} and the policy stores parameters in "
            f"{dtype}; expected {expected}, or 'direct'"
        )


def make_optimizer(
    config: OptimizerConfig, steps: int, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a config: clipping by global norm, then the update, state in float32.

    Args:
      config: name and settings of the optimizer.
      steps: number of updates in the whole run, for the schedule.
      seed: random seed of stochastic rounding.

    Returns:
      The optimizer. Its `init` and `update` take the parameters in their own dtype. Unless
      `config.parameters` is "direct", `init` raises a ValueError for parameters whose dtype the
      method does not support (`check_parameters`), and `update` needs `params`.

    Raises:
      ValueError: if the warm-up is not shorter than the run.
    """
    rate = make_schedule(config, steps)
    c = config
    optimizer = {
        "adamw": lambda: optax.adamw(rate, c.b1, c.b2, c.eps, weight_decay=c.weight_decay),
        "adam": lambda: optax.adam(rate, c.b1, c.b2, c.eps),
        "sgd": lambda: optax.sgd(rate, momentum=c.momentum or None, nesterov=c.momentum > 0),
        "lion": lambda: optax.lion(rate, c.b1, c.b2, weight_decay=c.weight_decay),
        "muon": lambda: optax.contrib.muon(
            rate, weight_decay=c.weight_decay, adam_weight_decay=c.weight_decay
        ),
    }[config.name]()
    if config.max_grad_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optimizer)
    if config.state != "float32":
        optimizer = _narrow(optimizer, jnp.dtype(config.state))
    # A separate random stream, because the seed also makes the parameters and the dropout keys.
    rounding_key = jax.random.fold_in(jax.random.key(seed), 0x524F554E)
    return {
        "direct": lambda: fp32_state(optimizer),
        "master": lambda: master_weights(optimizer),
        "remainder": lambda: bf16_remainder(optimizer),
        "stochastic": lambda: stochastic_rounding(optimizer, rounding_key),
        "kahan": lambda: kahan(optimizer),
    }[config.parameters]()


def _narrow(
    optimizer: optax.GradientTransformation, dtype: DTypeLike
) -> optax.GradientTransformationExtraArgs:
    """Run an optimizer on parameters and gradients cast to a dtype, as Optax alone does."""
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Any:
        return inner.init(cast_floating(params, dtype))

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any) -> Any:
        params = None if params is None else cast_floating(params, dtype)
        return inner.update(cast_floating(updates, dtype), state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
