"""Look up a function by its name in the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def pick(registry: Mapping[str, Entry], key: str, name: str) -> Entry:
    """Return the entry called ``name``.

    Args:
        registry: for example `LOSSES`.
        key: the config key that ``name`` came from, for the message: ``"algorithm.loss_type"``.

    Raises:
        ValueError: no such entry.
    """
    if name not in registry:
        raise ValueError(f"{key}: {name!r} is unknown; use one of {', '.join(sorted(registry))}")
    return registry[name]
