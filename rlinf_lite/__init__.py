"""rlinf_lite: distributed RL for language models that resumes to the same bits."""

__version__ = "0.1.0"
