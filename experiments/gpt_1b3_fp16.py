"""The gpt_1b3 family in float16 compute under a dynamic loss scale."""

from experiments.gpt_1b3 import experiment

EXPERIMENT = experiment("mixed_float16")
