"""Causal LMs: where they are, how they are built, sharded and filled."""
