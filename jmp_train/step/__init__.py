"""The pure train step: gradients, accumulation, state and evaluation; no file, no clock, no signal."""
