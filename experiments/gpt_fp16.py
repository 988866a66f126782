"""The gpt family in float16 compute under a dynamic loss scale."""

from experiments.gpt import experiment

EXPERIMENT = experiment("mixed_float16")
