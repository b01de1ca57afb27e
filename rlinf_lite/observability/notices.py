"""One-line notices on standard output that do not tear a progress bar."""

from __future__ import annotations

import sys

from tqdm import tqdm


def log_line(message: str) -> None:
    """Print ``message`` at once: a killed process must not take its last lines with it."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()
