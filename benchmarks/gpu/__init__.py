"""What a step costs on a GPU: ours, hand-written JAX and PyTorch, in every precision."""
