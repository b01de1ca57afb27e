"""A reward for responses of random tokens: it tells them apart, and means nothing."""

from __future__ import annotations


def score(response: str) -> float:
    """0 to 1."""
    return len(response) % 7 / 6
