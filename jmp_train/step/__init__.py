"""The pure train step and evaluation, free of files, clocks and signals."""

from jmp_train.step.accumulation import WeightedLoss
from jmp_train.step.devices import DataParallel
from jmp_train.step.evaluation import make_evaluate
from jmp_train.step.gradients import GradResult, value_and_grad
from jmp_train.step.state import LastSkip, StepInfo, TrainState
from jmp_train.step.step import Stepper, make_step, step_gradients

__all__ = [
    "DataParallel",
    "GradResult",
    "LastSkip",
    "StepInfo",
    "Stepper",
    "TrainState",
    "WeightedLoss",
    "make_evaluate",
    "make_step",
    "step_gradients",
    "value_and_grad",
]
