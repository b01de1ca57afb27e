"""Generating responses: the engine protocol, the builtin engine, canonical chunks."""
