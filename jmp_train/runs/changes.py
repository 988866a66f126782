"""Settings of a run that changed since it was saved, and which of them may change."""

from __future__ import annotations

from jmp_train.config.warmup import fitting_warmup
from jmp_train.types import Json

_MAY_CHANGE = (
    "steps",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "checkpoint_wait",
    "max_skipped_in_row",
    "nonfinite",
    "steps_per_call",
    "data_on_device",
    "mesh",
    "placement",
    "reduce_dtype",
    "optimizer.learning_rate",
    "trackers",
    "early_stop.metric",
    "early_stop.patience",
    "early_stop.min_delta",
    "early_stop.best",
)
_ORDER_OF_DATA = ("batch_size", "seed")  # and all of data.*


def differences(before: Json, now: Json) -> dict[str, str]:
    """Return `PATH OLD -> NEW` for each setting that differs, by its dotted path.

    >>> differences({"steps": 10, "seed": 0}, {"steps": 20, "seed": 0})
    {'steps': 'steps 10 -> 20'}
    """
    fields = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
    return {k: f"{k} {before.get(k)} -> {now.get(k)}" for k in fields}


def refused(changed: dict[str, str], before: Json, asked_warmup: int) -> list[str]:
    """Return the texts of the changes that only --force allows.

    A warm-up may change together with the number of steps if the saved run has the warm-up that
    `asked_warmup` gives for its saved number of steps. A number of classes may be added if none was
    saved; one that changes the model does not match its checkpoint.

    Args:
      changed: what `differences` returned.
      before: the saved settings by dotted path.
      asked_warmup: the warm-up steps that the experiment asks for, before they are fitted.

    >>> refused({"steps": "steps 10 -> 20", "seed": "seed 0 -> 1"}, {"steps": 10, "seed": 0}, 0)
    ['seed 0 -> 1']
    """
    may_change: set[str] = {*_MAY_CHANGE}
    steps, warmup = before.get("steps"), before.get("optimizer.warmup_steps")
    if isinstance(steps, int) and fitting_warmup(asked_warmup, steps) == warmup:
        may_change.add("optimizer.warmup_steps")
    if before.get("data.classes") is None:
        may_change.add("data.classes")
    return [text for field, text in changed.items() if field not in may_change]


def reordering(changed: dict[str, str]) -> list[str]:
    """Return the paths of the changed settings that give the run other batches.

    >>> reordering({"steps": "", "batch_size": "", "data.path": "", "data.classes": ""})
    ['batch_size', 'data.path']
    """
    order = [k for k in changed if k in _ORDER_OF_DATA or k.startswith("data.")]
    return [k for k in order if k != "data.classes"]
