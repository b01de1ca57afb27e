"""Problems from files or generated, and the index-addressed stream of prompts. No Ray, no process groups."""

from rlinf_lite.data.errors import DataError
from rlinf_lite.data.problems import ProblemSet, load_problems
from rlinf_lite.data.sampler import PromptStream

__all__ = ["DataError", "ProblemSet", "PromptStream", "load_problems"]
