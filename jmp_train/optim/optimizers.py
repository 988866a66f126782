"""Optimizers that an experiment chooses by name, with gradient clipping and narrow parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jmp_train.optim.bf16_remainder import bf16_remainder
from jmp_train.optim.config import OptimizerConfig
from jmp_train.optim.fp32_state import fp32_state
from jmp_train.optim.kahan import kahan
from jmp_train.optim.master_weights import master_weights
from jmp_train.optim.schedules import make_schedule
from jmp_train.optim.stochastic_rounding import stochastic_rounding
from jmp_train.tree import cast_floating
from jmp_train.types import DTypeLike, PyTree


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
    config: OptimizerConfig,
    steps: int,
    *,
    seed: int = 0,
    schedule: optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a config: clipping by global norm, then the update, state in float32.

    Args:
      config: name and settings of the optimizer.
      steps: number of updates in the whole run, for the schedule.
      seed: random seed of stochastic rounding.
      schedule: the learning rate by the number of updates made so far, any Optax schedule; replaces
        the one that `make_schedule` returns.

    Returns:
      The optimizer. Its `init` and `update` take the parameters in their own dtype. Unless
      `config.parameters` is "direct", `init` raises a ValueError for parameters whose dtype the
      method does not support (`check_parameters`), and `update` needs `params`.

    Raises:
      ValueError: if the warm-up is not shorter than the run.
    """
    rate = make_schedule(config, steps) if schedule is None else schedule
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
