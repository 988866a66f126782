"""The mlp family in float16 compute under a dynamic loss scale."""

from experiments.mlp import experiment

EXPERIMENT = experiment("mixed_float16")
