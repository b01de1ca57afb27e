"""Prints log lines on standard output without breaking a progress bar."""

from __future__ import annotations

import sys

from tqdm import tqdm


def log_line(message: str) -> None:
    """Print ``message`` and flush, so that a killed process does not lose its last lines."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()
