"""Generating responses: the engine protocol, the builtin engine, canonical chunks."""

from rlinf_lite.rollout.builtin import BuiltinEngine
from rlinf_lite.rollout.chunks import cut, join
from rlinf_lite.rollout.engine import RolloutEngine

__all__ = ["BuiltinEngine", "RolloutEngine", "cut", "join"]
