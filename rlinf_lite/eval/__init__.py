"""Evaluation: how often a checkpoint, an export or a base model answers right. No Ray: one process, one engine."""
