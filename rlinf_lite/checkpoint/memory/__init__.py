"""Checkpoints in memory, from which a replaced worker starts."""
