"""The linear family in float16 compute under a dynamic loss scale."""

from experiments.linear import experiment

EXPERIMENT = experiment("mixed_float16")
