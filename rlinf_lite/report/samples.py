"""Chooses the responses that the page shows: those of steps spread over the run, without reading the whole file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rlinf_lite.observability.jsonl import rows_of_step, seek_step, step_of
from rlinf_lite.observability.samples import prompt_of

_MOST_STEPS = 40
_ROWS_PER_STEP = 8
_MOST_CHARACTERS = 3_000_000
"""Limit on all texts of the page together."""
LONGEST_TEXT = 6000


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A response to show."""

    step: int
    prompt_id: int
    index: int
    """Index in the prompt's group."""
    prompt: str
    response: str
    reward: float | None
    """None if the response could not be graded."""
    error: str | None
    """Why the response could not be generated or graded, or counts as wrong."""


def choose_samples(path: Path) -> list[Sample]:
    """The first rows of up to `_MOST_STEPS` steps of ``rollouts.jsonl``, including the first and the last step."""
    steps = _spread(path)
    samples = [sample for step in steps for sample in _of_step(path, step)]
    while sum(len(sample.prompt) + len(sample.response) for sample in samples) > _MOST_CHARACTERS and len(steps) > 1:
        steps = [*steps[:-1:2], steps[-1]] if len(steps) > 2 else steps[-1:]
        samples = [sample for sample in samples if sample.step in steps]
    return samples


def _of_step(path: Path, step: int) -> Iterator[Sample]:
    for row in rows_of_step(path, step, _ROWS_PER_STEP):
        with suppress(KeyError, TypeError, ValueError):  # not a row of a response; the others are shown
            yield Sample(
                step=step,
                prompt_id=int(row["prompt_id"]),
                index=int(row["sample"]),
                prompt=_truncate(prompt_of(row)),
                response=_truncate(row["text"]),
                reward=None if row["reward"] is None else float(row["reward"]),
                error=row.get("error"),
            )


def _truncate(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text)} characters)"


def _spread(path: Path) -> list[int]:
    """The steps to show, in order."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        first, last = _step_at(file, 0), _last_step(file)
        if first is None or last is None:
            return []
        wanted = np.unique(np.linspace(first, last, _MOST_STEPS).round().astype(int))
        found = {_step_at(file, seek_step(file, int(step)), int(step)) for step in wanted}
    return sorted(step for step in found if step is not None)


def _last_step(file: BinaryIO) -> int | None:
    """The step of the last complete row, searched from the end of the file."""
    back, size = 1 << 16, file.seek(0, os.SEEK_END)
    while True:
        file.seek(max(size - back, 0))
        lines = file.read().splitlines(keepends=True)
        whole = [line for line in lines[0 if back >= size else 1 :] if line.endswith(b"\n")]
        step = next((step for line in reversed(whole) if (step := step_of(line)) is not None), None)
        if step is not None or back >= size:
            return step
        back *= 4


def _step_at(file: BinaryIO, offset: int, least: int = 0) -> int | None:
    """The step of the first complete row at or after ``offset`` whose step is at least ``least``."""
    file.seek(offset)
    steps = (step_of(line) for line in file if line.endswith(b"\n"))
    return next((step for step in steps if step is not None and step >= least), None)
