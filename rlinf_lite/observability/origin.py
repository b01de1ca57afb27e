"""What a run's rows are made with, so that a sink can tell whether rows that come again are those that it has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Decided once, by the runner, when a run starts, resumes or recovers."""

    recipe: str = ""
    """Digest of everything that makes the numbers: settings, data, model, actor ranks, devices. Rows of the same step
    that follow from the same checkpoint with the same recipe are equal. Empty: not known."""
    changes: tuple[str, ...] = ()
    """Why the rows after the committed step will not equal those logged before, for the user; empty: they will."""
