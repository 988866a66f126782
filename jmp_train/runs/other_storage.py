"""A checkpoint whose parameters are stored in another precision than the run wants them."""

from __future__ import annotations

from typing import Any

import jax

from jmp_train.config.settings import with_settings
from jmp_train.errors import UsageError
from jmp_train.optim.storage import full_parameters, store_as
from jmp_train.records.checkpoints import DoesNotFit, Restored
from jmp_train.reports.progress import print_line
from jmp_train.runs.build import abstract_state, make_stepper, make_task_of
from jmp_train.runs.context import RunContext
from jmp_train.step.state import TrainState
from jmp_train.tree import same_shapes
from jmp_train.types import Json, PyTree

_STORAGE = ("policy", "rules", "optimizer.parameters", "optimizer.state", "nonfinite")


def restore_stored_otherwise(
    context: RunContext, state: TrainState, before: Json
) -> Restored | None:
    """Restore the newest checkpoint of a run with another policy, and convert its parameters.

    They are widened to float32 with what the optimizer kept of them (a master, a remainder), then
    rounded once to what the run wants. The digests are those of what was saved. The optimizer's state,
    the moving average and the model state are kept; the loss scale is if both runs have the same kind.

    Args:
      context: the run.
      state: a first state of it.
      before: the settings that the checkpoint was saved with, by dotted path.

    Returns:
      The checkpoint, as a state like `state`; None if more than the storage differs.
    """
    experiment = context.experiment
    settings = {key: before[key] for key in before if _is_of_storage(key)}
    try:
        saved = with_settings(experiment, settings)
        task = make_task_of(saved, context.parts.dataset.spec)
        stepper = make_stepper(saved, task, context.parts.sharded)
        parts = context.parts._replace(task=task, stepper=stepper)
        restored = context.checkpoints.restore_latest(abstract_state(saved, parts))
    except (DoesNotFit, UsageError, ValueError):
        return None
    if restored is None:
        return None
    places = jax.tree.map(lambda x: x.sharding, state)
    try:
        converted = jax.jit(_converted, out_shardings=places)(restored.state, state)
    except ValueError:
        return None
    kinds = [{str(x.dtype) for x in jax.tree.leaves(s.params)} for s in (restored.state, state)]
    before_and_now = " -> ".join(", ".join(sorted(kind)) for kind in kinds)
    if kinds[0] == kinds[1]:
        print_line(context.console, "the optimizer's state was converted to that of these settings")
    else:
        print_line(context.console, f"parameters converted: {before_and_now}")
    return restored._replace(state=converted)


def _is_of_storage(key: str) -> bool:
    return key in _STORAGE or key.startswith("loss_scale.")


def _converted(saved: TrainState, like: TrainState) -> TrainState:
    full, inner = full_parameters(saved.params, saved.opt_state)
    params, opt_state = store_as(full, inner, like.params, like.opt_state)
    scale = saved.loss_scale if same_shapes(saved.loss_scale, like.loss_scale) else like.loss_scale
    return like._replace(
        step=saved.step,
        params=params,
        opt_state=opt_state,
        model_state=_as(saved.model_state, like.model_state),
        ema=_as(saved.ema, like.ema),
        loss_scale=scale,
        skipped=saved.skipped,
        skipped_in_row=saved.skipped_in_row,
        key=saved.key,
    )


def _as(saved: PyTree, like: PyTree) -> Any:
    if not same_shapes(saved, like):
        raise ValueError("the states have another structure")
    return jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), saved, like)
