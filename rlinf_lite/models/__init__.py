"""Causal LMs: find, check, build and shard them. Their weights are in `rlinf_lite.weights`."""
