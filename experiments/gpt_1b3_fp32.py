"""The gpt_1b3 family in float32 throughout."""

from experiments.gpt_1b3 import experiment

EXPERIMENT = experiment("float32")
