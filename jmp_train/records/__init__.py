"""Files of a run: checkpoints, digests, metrics, provenance."""
