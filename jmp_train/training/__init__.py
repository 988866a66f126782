"""Training: the pure train step, and what a run needs around it."""

from jmp_train.training.evaluation import make_evaluate
from jmp_train.training.state import LastSkip, StepInfo, TrainState
from jmp_train.training.step import Stepper, make_step

__all__ = ["LastSkip", "StepInfo", "Stepper", "TrainState", "make_evaluate", "make_step"]
