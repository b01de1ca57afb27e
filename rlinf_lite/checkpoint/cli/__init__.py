"""The functions behind ``python -m rlinf_lite.checkpoint``."""
