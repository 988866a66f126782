"""Experiments: their definition, search by name and changes of settings."""

from jmp_train.config.experiment import Experiment
from jmp_train.config.family import PRECISIONS
from jmp_train.config.find import experiment_files, find_experiment

__all__ = ["PRECISIONS", "Experiment", "experiment_files", "find_experiment"]
