"""Loads or generates the problems of a run, and orders them as an index-addressed stream of prompts."""

from rlinf_lite.data.errors import DataError
from rlinf_lite.data.problems import ProblemSet, load_problems
from rlinf_lite.data.sampler import PromptStream

__all__ = ["DataError", "ProblemSet", "PromptStream", "load_problems"]
