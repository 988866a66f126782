"""The gpt_124m family in float32 throughout."""

from experiments.gpt_124m import experiment

EXPERIMENT = experiment("float32")
