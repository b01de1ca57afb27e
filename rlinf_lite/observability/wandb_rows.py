"""Which rows were sent to which wandb run: a digest of each row and of what made it, in ``wandb_rows.jsonl``.

wandb cannot take a row back, so a row that comes again is compared with the one that was sent. Append-only: rows of
abandoned runs stay, because a run may return to them.
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
    """`Origin.recipe` of the process that made the row; empty: not known."""
    digest: str
    """As `digest_of`."""


class SentRows:
    """The rows sent so far, by run and step. A row is added before it is sent, so none that wandb has is missing here,
    unless an older version sent it, or its line was damaged: such a line counts as not there.
    """

    def __init__(self, log_path: Path) -> None:
        path = log_path / ROWS_FILE
        self._file = JsonlSink(path, committed_step=sys.maxsize)  # drops a torn last line, and nothing else
        self._runs: dict[str, dict[int, SentRow]] = {}
        self._recipes: dict[tuple[int, str], str] = {}
        for row in read_jsonl_rows(path):
            match row:
                case {"run": str(run), "step": int(step), "recipe": str(recipe), "digest": str(digest)}:
                    self._note(run, step, SentRow(recipe=recipe, digest=digest))

    def _note(self, run_id: str, step: int, sent: SentRow) -> None:
        self._runs.setdefault(run_id, {})[step] = sent
        self._recipes[step, sent.digest] = sent.recipe

    def of(self, run_id: str) -> dict[int, SentRow]:
        """By step; empty for a run that is not known here."""
        return self._runs.get(run_id, {})

    def recipe_of(self, step: int, digest: str) -> str:
        """What made a row that is sent once more, to whichever run it was sent first."""
        return self._recipes.get((step, digest), "")

    def add(self, run_id: str, step: int, sent: SentRow) -> None:
        if self.of(run_id).get(step) != sent:
            self._note(run_id, step, sent)
            self._file.log(step, {"run": run_id, "recipe": sent.recipe, "digest": sent.digest})

    def close(self) -> None:
        self._file.close()


def digest_of(metrics: Metrics) -> str:
    """Digest of a row without what the machine's speed and memory decide, which a replayed row does not repeat."""
    compared = {key: value for key, value in metrics.items() if not key.startswith(MACHINE_METRICS)}
    return fingerprints.of_value(compared)[:16]
