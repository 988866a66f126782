"""The linear family in bfloat16 compute."""

from experiments.linear import experiment

EXPERIMENT = experiment("mixed_bfloat16")
