"""Tasks: loss, metrics and prediction of a kind of problem."""

from jmp_train.tasks.kinds import TASKS, TaskKind, kind_of, make_task
from jmp_train.tasks.task import Task

__all__ = ["TASKS", "Task", "TaskKind", "kind_of", "make_task"]
