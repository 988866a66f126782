"""The gpt family in bfloat16 compute."""

from experiments.gpt import experiment

EXPERIMENT = experiment("mixed_bfloat16")
