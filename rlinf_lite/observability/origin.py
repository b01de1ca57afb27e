"""`Origin`: what decides the numbers of a run's rows, so that a sink can tell whether repeated rows will be equal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Set by the runner when a run starts, resumes or recovers."""

    recipe: str = ""
    """Digest of everything that decides the numbers: settings, data, model, devices. From the same checkpoint, the same
    recipe gives equal rows. Empty if not known."""
    changes: tuple[str, ...] = ()
    """Why rows after the committed step will differ from those logged before, for the user. Empty if they will not."""
