"""The gpt_124m family in bfloat16 compute."""

from experiments.gpt_124m import experiment

EXPERIMENT = experiment("mixed_bfloat16")
