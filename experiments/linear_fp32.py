"""The linear family in float32 throughout."""

from experiments.linear import experiment

EXPERIMENT = experiment("float32")
