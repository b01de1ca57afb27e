"""What a run has left in its directory, as one page: ``python -m rlinf_lite.report RUN_DIR``."""
