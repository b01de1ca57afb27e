"""What the rows of docs/performance.md share: two sides measured in turn, their medians, a ratio, a JSON file.

A row's script measures this project ("ours") and something else ("other": a peer, or what the machine itself can do)
in turn, so that both see the same state of the machine, prints the row, and with ``--out FILE`` writes it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """One line of docs/performance.md: figures of both sides, round by round, and what their ratio must reach."""

    number: str
    """In the table of docs/performance.md: ``"1"``, ``"1b"``."""
    work: str
    other: str
    """What ours is compared with, and its version."""
    goal: float
    at_most: bool = True
    """Whether the ratio may be at most, else must be at least, the goal."""
    unit: str = "s"
    ours: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    """What explains the figures: shares of time, a peak, an exponent; printed below the row."""

    @property
    def ratio(self) -> float:
        """Ours divided by the other, of the medians of all rounds."""
        return statistics.median(self.ours) / statistics.median(self.others)

    @property
    def reached(self) -> bool:
        return self.ratio <= self.goal if self.at_most else self.ratio >= self.goal

    def text(self) -> str:
        sign, verdict = ("<=" if self.at_most else ">="), ("reached" if self.reached else "MISSED")
        pairs = sorted(mine / theirs for mine, theirs in zip(self.ours, self.others, strict=True))
        lines = [
            f"row {self.number}: {self.work}",
            f"  ours  {statistics.median(self.ours):.4g} {self.unit}",
            f"  other {statistics.median(self.others):.4g} {self.unit}  ({self.other})",
            f"  ratio {self.ratio:.3f}, by round {pairs[0]:.3f} to {pairs[-1]:.3f} of {len(pairs)};"
            f" goal {sign} {self.goal:g}: {verdict}",
        ]
        return "\n".join([*lines, *(f"  {name}: {value}" for name, value in self.details.items())])


def in_turn(row: Row, ours: Callable[[], float], other: Callable[[], float], rounds: int) -> Row:
    """Measure both sides ``rounds`` times; who is first changes from round to round."""
    for number in range(rounds):
        sides = [(row.ours, ours), (row.others, other)]
        for figures, measure in sides if number % 2 == 0 else reversed(sides):
            figures.append(measure())
    return row


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that all rows have: ``--rounds`` and ``--out``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="measurements of each side (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    return parser


def finish(rows: list[Row], out: Path | None) -> None:
    """Print rows and write them with the command and the machine."""
    for row in rows:
        print(row.text(), flush=True)
    if out is not None:
        command = " ".join(["python", os.path.relpath(sys.argv[0]), *_without_out(sys.argv[1:])])
        shared = {"command": command, "machine": machine()}
        written = [{**asdict(row), "ratio": row.ratio, "reached": row.reached, **shared} for row in rows]
        out.write_text(json.dumps(written, indent=1) + "\n")


def number_of_threads(number: int) -> dict[str, str]:
    """Environment variables for a peer, whose other settings stay its own."""
    from rlinf_lite import numerics

    return {name: value for name, value in numerics.environment(number).items() if name.endswith("_THREADS")}


def machine() -> dict[str, Any]:
    import torch

    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _without_out(given: list[str]) -> list[str]:
    kept = [word for word in given if not word.startswith("--out=")]
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return kept
