"""The gpt_1b3 family in bfloat16 compute."""

from experiments.gpt_1b3 import experiment

EXPERIMENT = experiment("mixed_bfloat16")
