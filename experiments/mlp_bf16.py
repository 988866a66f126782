"""The mlp family in bfloat16 compute."""

from experiments.mlp import experiment

EXPERIMENT = experiment("mixed_bfloat16")
