"""What a run writes and reads again: checkpoints, digests, metrics, provenance."""
