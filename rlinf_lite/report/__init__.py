"""What a run has left in its folder, as one page: ``python -m rlinf_lite.report RUN_DIR``."""
