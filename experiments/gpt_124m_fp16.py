"""The gpt_124m family in float16 compute under a dynamic loss scale."""

from experiments.gpt_124m import experiment

EXPERIMENT = experiment("mixed_float16")
