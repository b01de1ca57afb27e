"""The command line ``python -m rlinf_lite.checkpoint``."""
