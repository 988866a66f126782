"""Tasks: loss, metrics and prediction of a kind of problem."""

from jmp_train.tasks.classification import classification, multi_label
from jmp_train.tasks.kinds import TASKS, get_task, make_task
from jmp_train.tasks.language_modelling import language_modelling
from jmp_train.tasks.regression import regression
from jmp_train.tasks.sequence_to_sequence import sequence_to_sequence
from jmp_train.tasks.task import Task, TaskFunctions

__all__ = [
    "TASKS",
    "Task",
    "TaskFunctions",
    "classification",
    "get_task",
    "language_modelling",
    "make_task",
    "multi_label",
    "regression",
    "sequence_to_sequence",
]
