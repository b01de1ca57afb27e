"""Writes the report page of a run, from the files in its directory: ``python -m rlinf_lite.report RUN_DIR``."""
