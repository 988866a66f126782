"""Runs of experiments: training, resuming, evaluating and comparing them in directories."""
