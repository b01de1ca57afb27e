"""`CheckpointManager`, for ordinary torch training scripts."""
