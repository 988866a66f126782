"""What an experiment is: plain data that says everything about a run, found by its name."""

from __future__ import annotations

import dataclasses
import importlib
import re
import reprlib
import sys
import traceback
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from jmp_train.fields import check_fields, fits
from jmp_train.optim.optimizers import OptimizerConfig, check_parameters
from jmp_train.precision.dtypes import nearest
from jmp_train.precision.loss_scale import (
    DynamicLossScale,
    LossScale,
    NoOpLossScale,
    StaticLossScale,
    default_loss_scale,
)
from jmp_train.precision.loss_scale_dict import rename
from jmp_train.precision.policy import Policy, get_policy
from jmp_train.precision.rules import Rules

ModelConfig = TypeVar("ModelConfig")
DataConfig = TypeVar("DataConfig")
E = TypeVar("E", bound="Experiment[Any, Any]")


#: The fields of `LossScaleConfig` that `DynamicLossScale` knows by jmp's names.
_FIELD_OF = {
    "period": "growth_interval",
    "factor": "growth_factor",
    "min_loss_scale": "minimum",
    "max_loss_scale": "maximum",
}


@dataclasses.dataclass(frozen=True)
class LossScaleConfig:
    """Loss scale; float16 compute needs one."""

    kind: Literal["auto", "none", "static", "dynamic"] = "auto"
    """auto: dynamic where the policy computes in float16, else none."""
    initial: float = 2.0**16
    """First scale (dynamic), or the scale (static)."""
    growth_interval: int = 2000
    """Finite steps in a row before the scale grows."""
    growth_factor: float = 2.0
    """What it is multiplied by then."""
    backoff_factor: float = 0.5
    """What it is multiplied by on a non-finite step."""
    minimum: float = 1.0
    """It never backs off below this."""
    maximum: float | None = None
    """It never grows above this; None: float32 is the limit."""
    hysteresis: int = 1
    """The number of non-finite steps on which it first backs off; 1 backs off at once."""
    consecutive_hysteresis: bool = False
    """Whether only non-finite steps in a row count for that; else they count until it grows."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.initial < float("inf"):
            raise ValueError(f"initial is {self.initial}; expected a finite number above 0")
        try:
            self._dynamic()
        except ValueError as error:
            raise ValueError(rename(str(error), _FIELD_OF)) from None

    def _dynamic(self) -> DynamicLossScale:
        return DynamicLossScale(
            self.initial,
            period=self.growth_interval,
            factor=self.growth_factor,
            min_loss_scale=self.minimum,
            backoff_factor=self.backoff_factor,
            max_loss_scale=self.maximum,
            hysteresis=self.hysteresis,
            consecutive_hysteresis=self.consecutive_hysteresis,
        )

    def make(self, policies: Iterable[Policy]) -> LossScale:
        """The first state of the loss scale under the policies of a model."""
        if self.kind == "none":
            return NoOpLossScale()
        if self.kind == "static":
            return StaticLossScale(self.initial)
        needed = any(not isinstance(default_loss_scale(p), NoOpLossScale) for p in policies)
        return self._dynamic() if self.kind == "dynamic" or needed else NoOpLossScale()


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
        for field, has in (("model", "task"), ("data", "load")):
            if not hasattr(getattr(self, field), has):
                raise ValueError(
                    f"{field} is {reprlib.repr(getattr(self, field))}; expected a configuration with "
                    f"a method {has!r}"
                )
        policies = [rule.policy for rule in Rules(self.rules).entries] or [get_policy(self.policy)]
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

    def _parameters_misfit(self, param_dtype: Any) -> str:
        """Why the optimizer's way with narrow parameters does not fit a dtype; "" if it does."""
        try:
            check_parameters(self.optimizer, param_dtype)
        except ValueError as error:
            return str(error)
        return ""


def fit_warmup(experiment: E) -> tuple[E, str]:
    """Scale a warm-up that is not shorter than its run to a tenth of the run.

    Args:
      experiment: whose `steps` may have been lowered without a thought of the warm-up.

    Returns:
      The experiment, changed only where its warm-up does not fit, and a line that says what changed;
      "" if nothing did.

    >>> from jmp_train.data import DigitsConfig
    >>> from jmp_train.models import MlpConfig
    >>> optimizer = OptimizerConfig(warmup_steps=100)
    >>> experiment = Experiment(MlpConfig(), DigitsConfig(), steps=60, optimizer=optimizer)
    >>> fitted, line = fit_warmup(experiment)
    >>> fitted.optimizer.warmup_steps
    6
    >>> print(line)
    warm-up scaled from 100 to 6 steps, a tenth of the run's 60 steps
    """
    asked, steps = experiment.optimizer.warmup_steps, experiment.steps
    scaled = fitting_warmup(asked, steps)
    if scaled == asked:
        return experiment, ""
    optimizer = dataclasses.replace(experiment.optimizer, warmup_steps=scaled)
    line = f"warm-up scaled from {asked} to {scaled} steps, a tenth of the run's {steps} steps"
    return dataclasses.replace(experiment, optimizer=optimizer), line


def fitting_warmup(warmup_steps: int, steps: int) -> int:
    """Return a warm-up that is shorter than its run as it is, and a tenth of the run for any other.

    >>> fitting_warmup(100, 1000), fitting_warmup(100, 60)
    (100, 6)
    """
    return warmup_steps if warmup_steps < steps else steps // 10


class UsageError(Exception):
    """The user's words are off: which, what was expected, and the nearest valid choice."""


def experiment_folders() -> list[Path]:
    """Where experiments are looked for: `experiments/` here, then the one beside the package."""
    roots = [Path.cwd(), Path(__file__).resolve().parents[1]]
    folders = [root / "experiments" for root in dict.fromkeys(roots)]
    return [folder for folder in folders if folder.is_dir()]


def experiment_files() -> dict[str, Path]:
    """The experiments by name, sorted: the files that set EXPERIMENT; nothing is run to find them.

    A file beside them that does not, such as mlp.py, may hold what a family shares.
    """
    files: dict[str, Path] = {}
    for folder in experiment_folders():
        for path in folder.glob("[a-z]*.py"):
            if path.stem not in files and _sets_experiment(path):
                files[path.stem] = path
    return dict(sorted(files.items()))


def _sets_experiment(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return path.is_file()  # so that running it says what is wrong; a folder is passed over
    return re.search(r"^EXPERIMENT\b.*=", text, re.MULTILINE) is not None


def find_experiment(name: str) -> Experiment[Any, Any]:
    """The experiment of a name.

    Args:
      name: a file of an `experiments/` folder, without its folder and ending.

    Raises:
      UsageError: for a name that is none, with the nearest that is; for a file that cannot be run
        or sets EXPERIMENT to something else.
    """
    files = experiment_files()
    if name not in files:
        family = [n for n in files if n.startswith(name + "_")]
        if family and re.fullmatch(r"\w+", name):
            raise UsageError(f"{name!r} is a family; its experiments are {', '.join(family)}")
        hint = nearest(name, files) if files else "there is no experiments/ folder here"
        raise UsageError(f"unknown experiment {name!r}; {hint} (jmp-train list shows all)")
    # One package over all the folders, whether or not one of them is a package of its own.
    package = types.ModuleType("experiments")
    package.__path__ = [str(folder) for folder in experiment_folders()]
    sys.modules["experiments"] = package
    sys.modules.pop(f"experiments.{name}", None)
    try:
        experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(files[name])]
        where = f" (line {lines[-1]})" if lines else ""
        raise UsageError(f"{files[name]} cannot be run: {what}{where}") from error
    if not isinstance(experiment, Experiment):
        raise UsageError(
            f"{files[name]} sets EXPERIMENT to {reprlib.repr(experiment)}; expected an Experiment"
        )
    return experiment


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted path.

    >>> flatten({"steps": 3, "optimizer": {"name": "sgd"}})
    {'steps': 3, 'optimizer.name': 'sgd'}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


C = TypeVar("C")


def with_settings(config: C, settings: Mapping[str, Any], prefix: str = "") -> C:
    """A configuration with other values for some of its settings.

    Args:
      config: a dataclass, which may hold others.
      settings: by dotted path, as `flatten` gives them for what config.json holds: tuples are
        lists, and numbers that are not finite are text.
      prefix: the path of the configuration itself, for messages.

    Raises:
      ValueError: for a path that is no setting, with the nearest that is; for a value that the
        configuration refuses.

    >>> with_settings(OptimizerConfig(), {"learning_rate": 0.1, "max_grad_norm": "inf"}).max_grad_norm
    inf
    >>> with_settings(OptimizerConfig(), {"lerning_rate": 0.1}, "optimizer.")
    Traceback (most recent call last):
    ValueError: 'optimizer.lerning_rate' is no setting; did you mean 'learning_rate'?
    """
    kinds = typing.get_type_hints(type(config))
    fields = [field.name for field in dataclasses.fields(config)]  # pyright: ignore
    inner: dict[str, dict[str, Any]] = {}
    changed: dict[str, Any] = {}
    for path, value in settings.items():
        name, dot, rest = path.partition(".")
        nested = name in fields and dataclasses.is_dataclass(getattr(config, name))
        if name not in fields or (dot and not nested):
            raise ValueError(f"{prefix + path!r} is no setting; {nearest(name, fields)}")
        if nested and not dot:
            raise ValueError(f"{prefix + path} is {reprlib.repr(value)}; expected its settings")
        if nested:
            inner.setdefault(name, {})[rest] = value
        else:
            changed[name] = _from_json(value, kinds[name])
    for name, values in inner.items():
        changed[name] = with_settings(getattr(config, name), values, f"{prefix}{name}.")
    try:
        return dataclasses.replace(config, **changed)  # pyright: ignore
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _from_json(value: Any, kind: Any) -> Any:
    """What `strict_json` wrote, as it was."""
    if isinstance(value, list):
        return tuple(_from_json(item, kind) for item in value)
    if value in ("nan", "inf", "-inf") and not fits(value, kind):
        return float(value)
    return value
