"""Records in ``wandb_rows.jsonl`` which rows were sent to which wandb run: a digest of each row, and its recipe.

Rows cannot be removed from wandb, so a repeated row is compared with the one that was sent. The file is append-only:
rows of abandoned runs stay, because a run may return to them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rlinf_lite import fingerprints
from rlinf_lite.config.metric_names import MACHINE_METRICS
from rlinf_lite.observability.jsonl import JsonlSink, read_jsonl_rows
from rlinf_lite.observability.sinks import Metrics

ROWS_FILE = "wandb_rows.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class SentRow:
    recipe: str
    """`Origin.recipe` of the process that logged the row; empty if not known."""
    digest: str
    """From `digest_of`."""


class SentRows:
    """The rows sent so far, by run and step.

    A row is added before it is sent, so every row that wandb has is here, unless an older version sent it or its line
    was damaged (damaged lines are ignored).
    """

    def __init__(self, log_path: Path) -> None:
        path = log_path / ROWS_FILE
        self._file = JsonlSink(path, committed_step=sys.maxsize)  # drops a torn last line, and nothing else
        self._runs: dict[str, dict[int, SentRow]] = {}
        self._recipes: dict[tuple[int, str], str] = {}
        for row in read_jsonl_rows(path):
            match row:
                case {"run": str(run), "step": int(step), "recipe": str(recipe), "digest": str(digest)}:
                    self._remember(run, step, SentRow(recipe=recipe, digest=digest))

    def _remember(self, run_id: str, step: int, sent: SentRow) -> None:
        self._runs.setdefault(run_id, {})[step] = sent
        self._recipes[step, sent.digest] = sent.recipe

    def of(self, run_id: str) -> dict[int, SentRow]:
        """The rows of a run by step; empty for an unknown run."""
        return self._runs.get(run_id, {})

    def recipe_of(self, step: int, digest: str) -> str:
        """The recipe of a row, whichever run it was sent to first; empty if not known."""
        return self._recipes.get((step, digest), "")

    def add(self, run_id: str, step: int, sent: SentRow) -> None:
        if self.of(run_id).get(step) != sent:
            self._remember(run_id, step, sent)
            self._file.log(step, {"run": run_id, "recipe": sent.recipe, "digest": sent.digest})

    def close(self) -> None:
        self._file.close()


def digest_of(metrics: Metrics) -> str:
    """Digest of a row without metrics of speed and memory, which differ each time the step is computed."""
    compared = {key: value for key, value in metrics.items() if not key.startswith(MACHINE_METRICS)}
    return fingerprints.of_value(compared)[:16]
