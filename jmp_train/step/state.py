"""State and info of a train step."""

from __future__ import annotations

from typing import NamedTuple

import jax

from jmp_train.loss_scales.states import LossScale
from jmp_train.types import Key, PyTree


class LastSkip(NamedTuple):
    """The last step that was skipped."""

    step: jax.Array  # shape=(), int32: count of steps including it; 0 if no step was skipped
    # shape=(leaves of parameters and model state,), bool: which parameters had a non-finite
    # gradient, then which leaves of the model state became non-finite
    nonfinite: jax.Array


class TrainState(NamedTuple):
    """Everything that changes during training: a pytree of arrays."""

    step: jax.Array  # shape=(), int32: number of steps, skipped steps included
    params: PyTree  # in the policy's parameter dtype
    opt_state: PyTree  # float32, except the corrections that keep narrow parameters exact
    model_state: PyTree  # batch statistics, for example; float32; None without a model state
    ema: PyTree  # moving average of the parameters, float32; None without `ema_decay`
    loss_scale: LossScale
    skipped: jax.Array  # shape=(), int32: number of skipped steps
    skipped_in_row: jax.Array  # shape=(), int32: skipped steps since the last step taken
    last_skip: LastSkip | None  # None if steps are never skipped
    key: Key | None  # PRNG key, constant: step n uses fold_in(key, n); None without a key

    @property
    def eval_params(self) -> PyTree:
        """The parameters to evaluate: the moving average, or `params` without one."""
        return self.params if self.ema is None else self.ema


class StepInfo(NamedTuple):
    """Info of one step; unused fields are None, because computing even a scalar costs time."""

    loss: jax.Array  # shape=(), float32: unscaled
    aux: PyTree  # auxiliary output of the loss function
    finite: jax.Array | None  # shape=(), bool: False for a skipped step; None if never skipped
    # shape=(), float32: global norm of the unscaled gradients before clipping; None by default
    grad_norm: jax.Array | None
    loss_scale: jax.Array | None  # shape=(), float32: loss scale of this step; None without one
