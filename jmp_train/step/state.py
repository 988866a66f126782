"""What a train step carries from one step to the next, and what it tells about one."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from jmp_train.loss_scales.states import LossScale


class LastSkip(NamedTuple):
    """The last step that was skipped."""

    step: jax.Array  # shape=(), int32: steps taken after it; 0 where none was skipped
    # shape=(leaves of parameters and model state,), bool: parameters whose gradient was not finite,
    # then leaves of the model state that became non-finite
    nonfinite: jax.Array


class TrainState(NamedTuple):
    """Everything that changes during training: a pytree of arrays."""

    step: jax.Array  # shape=(), int32: steps taken, skipped ones included
    params: Any  # in the policy's parameter dtype
    opt_state: Any  # float32, but for what keeps narrow parameters exact
    model_state: Any  # batch statistics and the like, float32; None without
    ema: Any  # moving average of the parameters, float32; None without
    loss_scale: LossScale
    skipped: jax.Array  # shape=(), int32: steps skipped because something was not finite
    skipped_in_row: jax.Array  # shape=(), int32: of those, the ones since the last good step
    last_skip: Any  # a LastSkip; None where steps are not skipped
    key: Any  # a PRNG key, the same all along: step n uses fold_in(key, n); None without

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate: their moving average where there is one."""
        return self.params if self.ema is None else self.ema


class StepInfo(NamedTuple):
    """What one step tells; what a step does not use is None, for even a scalar costs time."""

    loss: jax.Array  # shape=(), float32: unscaled
    aux: Any  # what the loss function returned beside the loss
    finite: Any  # shape=(), bool: whether the step was taken; None where steps are not skipped
    grad_norm: (
        Any  # shape=(), float32: global norm, unscaled and before clipping; None if not asked
    )
    loss_scale: Any  # shape=(), float32: the scale that this step was taken under; None without
