"""Checkpoints held in memory: what a replaced worker starts from."""
