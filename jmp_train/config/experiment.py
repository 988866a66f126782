"""Experiments: plain data that determines a run."""

from __future__ import annotations

import dataclasses
import functools
import reprlib
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

from jmp_train.config.early_stop import EarlyStopConfig
from jmp_train.configurable import Configured
from jmp_train.fields import check_fields
from jmp_train.loss_scales.config import LossScaleConfig
from jmp_train.models.model import Model
from jmp_train.optim.config import OptimizerConfig
from jmp_train.optim.optimizers import check_parameters
from jmp_train.policy.precision import Precision, get_precision
from jmp_train.records.trackers import Tracker, TrackerName
from jmp_train.sharding.mesh import MeshShape
from jmp_train.sharding.placement import Placement
from jmp_train.spec import DataSpec
from jmp_train.step.state import TrainState
from jmp_train.tasks.kinds import get_task, make_task
from jmp_train.tasks.task import Task, TaskFunctions
from jmp_train.types import DTypeLike, Json

# Of a field that is a value of Python: no option, and not in config.json.
_PYTHON = {"setting": False}

ModelConfig = TypeVar("ModelConfig")
DataConfig = TypeVar("DataConfig")


@dataclasses.dataclass(frozen=True)
class Experiment(Generic[ModelConfig, DataConfig]):
    """Settings of a run: model, data, precision, schedule of steps and optimizer."""

    model: ModelConfig
    """The network: `jmp_train.Model(Net, width=64)`, or a class of a module."""
    data: DataConfig
    """The data: a configuration with a method `load` that returns a `Dataset`."""
    task: str | Task = dataclasses.field(
        default="classification", kw_only=True, metadata={"setting": False}
    )
    """What the network is trained for: a name in `jmp_train.tasks.TASKS`, or a `jmp_train.Task`."""
    policy: str = "float32"
    """Precision policy, such as mixed_bfloat16 or params=float32,compute=float16,output=float32."""
    rules: tuple[str, ...] = ()
    """Policies by module path, each 'PATTERN=POLICY'; first match wins; they replace --policy."""
    steps: int = 1000
    """Number of training steps; a warm-up of as many or more is scaled to a tenth of them."""
    batch_size: int = 128
    """Number of examples in a batch."""
    micro_batches: int = 1
    """Number of micro-batches per step, to save memory; must divide the batch size."""
    seed: int = 0
    """Random seed for parameter initialisation, data order and dropout."""
    log_every: int = 100
    """Number of steps between lines of metrics."""
    eval_every: int = 500
    """Number of steps between evaluations on the held-out data."""
    checkpoint_every: int = 500
    """Number of steps between checkpoints; the last step is always saved."""
    checkpoint_wait: bool = False
    """Wait until each checkpoint is on disk, so that a kill loses at most one interval."""
    steps_per_call: int | None = None
    """Number of steps per dispatch to the device; must divide the step counts above. None: chosen
    from them, the size of a step and a limit of 0.1 s. The run is bitwise the same with each."""
    mesh: str = ""
    """Devices by axis, such as data=2,fsdp=4; -1 takes all that are left. data: copies of the
    parameters; fsdp: shares of them; tensor: shares of their products. "": all devices on data."""
    placement: tuple[str, ...] = ()
    """Mesh axes of parameters by their paths, each 'PATTERN=AXES', such as '**/up/kernel=-,tensor';
    first match wins. Other parameters lie where the model says, or by fsdp over their largest axis."""
    reduce_dtype: Literal["compute", "float32", "bfloat16", "float16"] = "compute"
    """Dtype of the sums of gradients over several devices; compute: that of the gradients."""
    data_on_device: bool = True
    """Keep training arrays on the device if they need at most a quarter of its memory; False: send
    each batch. Data with random augmentation are always sent."""
    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """Response to a non-finite step that no loss scale skips.
    stop: end the run.
    skip: skip the step; if that does not help, end the run.
    rollback: resume from the latest checkpoint, after the bad batch."""
    ema_decay: float | None = None
    """Decay of a moving average of the parameters, used in evaluation; None: no average."""
    max_skipped_in_row: int = 100
    """Number of skipped steps in a row that ends the run, with a report of their cause."""
    matmul_precision: Literal["default", "high", "highest"] = "default"
    """Precision of float32 matrix products; on recent GPUs, default is TF32, highest float32."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss_scale: LossScaleConfig = dataclasses.field(default_factory=LossScaleConfig)
    early_stop: EarlyStopConfig = dataclasses.field(default_factory=EarlyStopConfig)
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Trackers of the records, beside metrics.jsonl; wandb and mlflow are extras to install."""
    own_trackers: tuple[Tracker, ...] = dataclasses.field(default=(), metadata=_PYTHON)
    """Trackers of your own (docs/trackers.md)."""
    on_record: Callable[[Json, TrainState], Literal["stop"] | None] | None = dataclasses.field(
        default=None, metadata=_PYTHON
    )
    """Function of each record and the state on the device; "stop" ends the run after a checkpoint."""
    schedule: Callable[[Any], Any] | None = dataclasses.field(default=None, metadata=_PYTHON)
    """Learning rate by the number of updates so far, such as an Optax schedule; replaces those of
    the optimizer's settings."""

    def __post_init__(self) -> None:
        check_fields(self)
        model: Any = self.model
        if not isinstance(model, Configured):
            if not callable(model):
                raise ValueError(  # noqa: TRY004  (a value in an experiment, like any other)
                    f"model is {reprlib.repr(self.model)}; expected jmp_train.Model(Net, ...), where "
                    "Net is a class of an NNX or a Linen module (docs/models.md)"
                )
            object.__setattr__(self, "model", Model(model))
        if not hasattr(self.data, "load"):
            raise ValueError(
                f"data is {reprlib.repr(self.data)}; expected a configuration with a method 'load' "
                "(docs/data.md)"
            )
        self._check_hooks()
        get_task(self.task)  # raises for an unknown one
        policies = self.precision.policies
        misfits = [m for p in policies if (m := self._parameters_misfit(p.param_dtype))]
        if len(misfits) == len(policies):
            raise ValueError(misfits[0])
        for field in (
            "steps",
            "batch_size",
            "micro_batches",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "max_skipped_in_row",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected at least 1")
        if not self.steps < 2**31:  # the optimizer counts steps in an int32
            raise ValueError(f"steps is {self.steps}; expected at most {2**31 - 1}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; expected 0 < ema_decay < 1, or None")
        if not 0 <= self.seed < 2**32:  # jax.random.key drops the higher bits
            raise ValueError(f"seed is {self.seed}; expected 0 to {2**32 - 1}")
        self._check_steps_per_call()
        MeshShape.parse(self.mesh)
        Placement(self.placement)
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size is {self.batch_size}; expected a multiple of micro_batches "
                f"({self.micro_batches})"
            )

    def _check_steps_per_call(self) -> None:
        if self.steps_per_call is None:
            return
        if self.steps_per_call < 1:
            raise ValueError(
                f"steps_per_call is {self.steps_per_call}; expected at least 1, or None"
            )
        for field in ("steps", "log_every", "eval_every", "checkpoint_every"):
            if getattr(self, field) % self.steps_per_call:
                raise ValueError(
                    f"{field} is {getattr(self, field)}; expected a multiple of steps_per_call "
                    f"({self.steps_per_call})"
                )

    def _check_hooks(self) -> None:
        for tracker in self.own_trackers:
            if isinstance(tracker, type) or not isinstance(tracker, Tracker):
                raise ValueError(  # noqa: TRY004  # a value in a file, like any other
                    f"own_trackers holds {reprlib.repr(tracker)}; expected objects with methods start, "
                    "record and finish (docs/trackers.md)"
                )
        for field in ("on_record", "schedule"):
            value = getattr(self, field)
            if value is not None and not callable(value):
                raise ValueError(f"{field} is {reprlib.repr(value)}; expected a function, or None")
        default = OptimizerConfig()
        for field in ("learning_rate", "schedule", "warmup_steps"):
            value = getattr(self.optimizer, field)
            if self.schedule is not None and value != getattr(default, field):
                raise ValueError(
                    f"optimizer.{field} is {value!r}; expected it unset, for the experiment's own "
                    "schedule replaces it"
                )

    @functools.cached_property
    def precision(self) -> Precision:
        """The parsed policy and rules."""
        return get_precision(self.policy, self.rules)

    @property
    def metric(self) -> str:
        """Name of the metric that runs are compared by."""
        return get_task(self.task).metric

    @property
    def highest(self) -> bool:
        """Whether higher values of the metric are better."""
        return get_task(self.task).highest

    def functions(self, spec: DataSpec, precision: Precision | None = None) -> TaskFunctions:
        """Return the model and its task on a data set as functions, under the experiment's precision
        by default.

        Raises:
          ValueError: if a rule matches no module, or if the data lack an array that the task reads.
        """
        model: Any = self.model  # made a `Configured` above
        return make_task(model, self.task, spec, precision or self.precision)

    def _parameters_misfit(self, param_dtype: DTypeLike) -> str:
        """Return why `optimizer.parameters` does not apply to a dtype; "" if it does."""
        try:
            check_parameters(self.optimizer, param_dtype)
        except ValueError as error:
            return str(error)
        return ""


AnyExperiment = Experiment[Any, Any]
"""An experiment of any model and data."""
