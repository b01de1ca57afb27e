"""One row of a data file, before anyone has asked what it means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a source."""

    path: str
    """The path exactly as configured, for messages."""
    line: int
    """1-based: the line of a text file, the row of a table."""
    fields: dict[str, Any]
    exact: Callable[[], dict[str, Any]] | None = None
    """The fields with `Decimal` where a float may differ from the number that is stored; None: none does."""

    @property
    def where(self) -> str:
        """For error messages: ``"data/train.jsonl:17"``."""
        return f"{self.path}:{self.line}"

    @property
    def source(self) -> str:
        """For ``Problem.source``: ``"train.jsonl:17"``."""
        return f"{display_name(self.path)}:{self.line}"


def display_name(path: str) -> str:
    """How messages and ``Problem.source`` name a configured path: without its directories."""
    return path if path.startswith("hf:") else PurePath(path).name
