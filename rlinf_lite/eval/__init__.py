"""Evaluates a checkpoint, an export or a base model on a data set, in one process, without Ray."""
