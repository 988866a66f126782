"""The mlp family in float32 throughout."""

from experiments.mlp import experiment

EXPERIMENT = experiment("float32")
