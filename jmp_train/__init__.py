"""jmp_train: mixed-precision training for JAX and Flax, in pure functions.

Namespaces hold the rest: `jmp_train.optim` (optimizers for narrow parameters), `.loss_scales`
(interchange, configuration), `.numerics` (formats, rounding, histograms), `.debug` (the first
non-finite operation, what autocast did), `.flax` (policies on NNX and Linen models), `.sharding`
(meshes and placements), `.testing` (assertions for tests).
"""

from typing import TYPE_CHECKING, Any

from jmp_train import debug, loss_scales, numerics, optim, sharding
from jmp_train._autocast.op_rules import OpRules, default_op_rules
from jmp_train._autocast.regions import with_precision
from jmp_train._autocast.traced_in_half import traced_in_half
from jmp_train._autocast.transform import autocast
from jmp_train.loss_scales.states import DynamicLossScale, LossScale, NoOpLossScale, StaticLossScale
from jmp_train.numerics.dtypes import half_dtype
from jmp_train.policy.policy import Policy, get_policy
from jmp_train.policy.precision import Precision, default_loss_scale, get_precision
from jmp_train.policy.rules import Rules
from jmp_train.step.accumulation import WeightedLoss
from jmp_train.step.devices import DataParallel
from jmp_train.step.evaluation import make_evaluate
from jmp_train.step.gradients import value_and_grad
from jmp_train.step.state import StepInfo, TrainState
from jmp_train.step.step import make_step
from jmp_train.tree import all_finite, cast_to_full, cast_to_half, select_tree

if TYPE_CHECKING:
    from jmp_train import flax, tasks, testing
    from jmp_train.config.experiment import Experiment
    from jmp_train.data.data import Data
    from jmp_train.models.model import Model
    from jmp_train.results.load import Run, load_run
    from jmp_train.runs.train import train
    from jmp_train.tasks.task import Task

__all__ = [
    "Data",
    "DataParallel",
    "DynamicLossScale",
    "Experiment",
    "LossScale",
    "Model",
    "NoOpLossScale",
    "OpRules",
    "Policy",
    "Precision",
    "Rules",
    "Run",
    "StaticLossScale",
    "StepInfo",
    "Task",
    "TrainState",
    "WeightedLoss",
    "all_finite",
    "autocast",
    "cast_to_full",
    "cast_to_half",
    "debug",
    "default_loss_scale",
    "default_op_rules",
    "flax",
    "get_policy",
    "get_precision",
    "half_dtype",
    "load_run",
    "loss_scales",
    "make_evaluate",
    "make_step",
    "numerics",
    "optim",
    "select_tree",
    "sharding",
    "tasks",
    "testing",
    "traced_in_half",
    "train",
    "value_and_grad",
    "with_precision",
]


#: Public names whose modules import Flax or the libraries of training, and so are imported when used.
_LATER = {
    "Data": "data.data",
    "Experiment": "config.experiment",
    "Model": "models.model",
    "Run": "results.load",
    "Task": "tasks.task",
    "load_run": "results.load",
    "train": "runs.train",
}


def __getattr__(name: str) -> Any:
    """Return what takes long to find, when it is first used: modules that import Flax, the version."""
    import importlib

    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("jmp-train")
    if name in ("flax", "tasks", "testing"):
        return importlib.import_module(f"jmp_train.{name}")
    if name in _LATER:
        return getattr(importlib.import_module(f"jmp_train.{_LATER[name]}"), name)
    raise AttributeError(f"module 'jmp_train' has no attribute {name!r}")
