"""Checkpoints for an ordinary torch script."""
