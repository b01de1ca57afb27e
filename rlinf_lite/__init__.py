"""rlinf_lite: distributed RL for language models with bit-exact resume."""

__version__ = "0.1.0"
