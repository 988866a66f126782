"""The gpt family in float32 throughout."""

from experiments.gpt import experiment

EXPERIMENT = experiment("float32")
