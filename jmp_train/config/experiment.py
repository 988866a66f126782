"""What an experiment is: plain data that says everything about a run, found by its name."""

from __future__ import annotations

import dataclasses
import reprlib
from typing import Any, Generic, Literal, TypeVar

from jmp_train.errors import nearest
from jmp_train.fields import check_fields
from jmp_train.loss_scales.config import LossScaleConfig
from jmp_train.optim.optimizers import OptimizerConfig, check_parameters
from jmp_train.policy.precision import Precision, get_precision
from jmp_train.spec import DataSpec
from jmp_train.tasks.kinds import TASKS, make_task
from jmp_train.tasks.task import Task

ModelConfig = TypeVar("ModelConfig")
DataConfig = TypeVar("DataConfig")
E = TypeVar("E", bound="Experiment[Any, Any]")


@dataclasses.dataclass(frozen=True)
class Experiment(Generic[ModelConfig, DataConfig]):
    """Everything that a run is made from."""

    model: ModelConfig
    data: DataConfig
    policy: str = "float32"
    """Precision policy, such as mixed_bfloat16 or params=float32,compute=float16,output=float32."""
    rules: tuple[str, ...] = ()
    """Policies by module path, 'PATTERN=POLICY' each, first match wins; they replace --policy."""
    steps: int = 1000
    """Training steps in the whole run; a warm-up that is not shorter is scaled to a tenth of it."""
    batch_size: int = 128
    """Examples in a batch."""
    micro_batches: int = 1
    """Parts of a batch that run in turn, to save memory; divides batch_size."""
    seed: int = 0
    """Of the initial parameters, the order of the data and dropout."""
    log_every: int = 100
    """Steps between two lines of metrics."""
    eval_every: int = 500
    """Steps between two evaluations on the held-out data."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; the last step is always saved."""
    checkpoint_wait: bool = False
    """Wait until each checkpoint is on the disk, so that a kill costs one interval at the most."""
    steps_per_call: int = 1
    """Steps in one dispatch to the device; divides the four numbers of steps above."""
    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """Where a loss or a gradient is not finite and no loss scale skips the step: stop ends the run, skip
    skips every such step, rollback goes on from the newest checkpoint with the batches after the bad
    one. What skipping does not mend ends the run, or rolls it back."""
    ema_decay: float | None = None
    """Decay of a moving average of the parameters, which is then what is evaluated; None keeps none."""
    max_skipped_in_row: int = 100
    """So many skipped steps in a row end the run, with a report of what went non-finite first."""
    matmul_precision: Literal["default", "high", "highest"] = "default"
    """Precision of float32 matrix products: on a recent GPU default is TF32, highest is float32."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss_scale: LossScaleConfig = dataclasses.field(default_factory=LossScaleConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        for field, has in (("model", "network"), ("data", "load")):
            if not hasattr(getattr(self, field), has):
                raise ValueError(
                    f"{field} is {reprlib.repr(getattr(self, field))}; expected a configuration with "
                    f"a method {has!r}"
                )
        kind = str(getattr(self.model, "task", ""))
        if kind not in TASKS:
            name = type(self.model).__name__
            raise ValueError(f"the task of {name} is {kind!r}; {nearest(kind, TASKS)}")
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
            "steps_per_call",
            "max_skipped_in_row",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected at least 1")
        if not self.steps < 2**31:  # the optimizer counts them in an int32
            raise ValueError(f"steps is {self.steps}; expected at most {2**31 - 1}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; expected 0 < ema_decay < 1, or None")
        if not 0 <= self.seed < 2**32:  # jax.random.key drops the higher bits
            raise ValueError(f"seed is {self.seed}; expected 0 to {2**32 - 1}")
        for field in ("steps", "log_every", "eval_every", "checkpoint_every"):
            if getattr(self, field) % self.steps_per_call:
                raise ValueError(
                    f"{field} is {getattr(self, field)}; expected a multiple of steps_per_call "
                    f"({self.steps_per_call})"
                )
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size is {self.batch_size}; expected a multiple of micro_batches "
                f"({self.micro_batches})"
            )

    @property
    def precision(self) -> Precision:
        """The policy and the rules, parsed."""
        return get_precision(self.policy, self.rules)

    @property
    def metric(self) -> str:
        """The metric that runs are compared by."""
        return TASKS[self.model.task].metric  # pyright: ignore

    @property
    def highest(self) -> bool:
        """Whether the highest value of the metric is the best."""
        return TASKS[self.model.task].highest  # pyright: ignore

    def task(self, spec: DataSpec, precision: Precision | None = None) -> Task:
        """Return the task of the model on data, under the experiment's precision or another.

        Raises:
          ValueError: for a rule that matches no module, and for data without what the task reads.
        """
        return make_task(self.model, spec, precision or self.precision)

    def _parameters_misfit(self, param_dtype: Any) -> str:
        """Why the optimizer's way with narrow parameters does not fit a dtype; "" if it does."""
        try:
            check_parameters(self.optimizer, param_dtype)
        except ValueError as error:
            return str(error)
        return ""
