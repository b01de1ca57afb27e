"""What is wrong with a user's data. The message names the file, the line and the remedy."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be trained on. One message string, so that it pickles across processes."""
