"""wandb, online or offline: its run shows the rows of ``metrics.jsonl``, however often the process was killed.

Rows cannot be taken back from wandb. A resume finds out which steps wandb has (the server or the offline files say),
sends the missing ones from ``metrics.jsonl`` (their tables of responses from ``rollouts.jsonl``), and leaves out rows
that come again and are equal. Where rows come again and are not, a new wandb run branches off before them. It never
prompts and never stops a run.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rlinf_lite.config import LoggerConfig
from rlinf_lite.observability.events import EVENTS_FILE, RESTARTS, History
from rlinf_lite.observability.jsonl import read_jsonl_rows
from rlinf_lite.observability.notices import log_line
from rlinf_lite.observability.origin import Origin
from rlinf_lite.observability.samples import COLUMNS, samples_of
from rlinf_lite.observability.sinks import Metrics
from rlinf_lite.observability.wandb_file import recorded_steps
from rlinf_lite.observability.wandb_rows import SentRow, SentRows, digest_of
from rlinf_lite.observability.wandb_start import Branch, Starter
from rlinf_lite.observability.wandb_state import WandbState, read_state, write_state


class WandbSink:
    """Sends each step once to the run that it belongs to.

    Args:
        run: what ``wandb.init`` returned.
        starter: starts a branch, where one is needed.
        metrics_file: rows that a run lacks are read from there.
        sent: what was sent by now; closed with the sink.
        origin: what makes the rows from now on.
    """

    def __init__(self, run: Any, starter: Starter, metrics_file: Path, sent: SentRows, origin: Origin) -> None:
        self._starter, self._metrics_file, self._log_path = starter, metrics_file, metrics_file.parent
        self._sent, self._origin = sent, origin
        self._lost = self._closed = False
        self._take(run)

    def _take(self, run: Any) -> None:
        self.run_id: str = run.id
        self._run = run
        self._recorded = _steps_it_has(run, self._log_path)
        self._last_step = max(self._recorded, default=-1)
        self._history = History(self._log_path / EVENTS_FILE, committed_step=0)
        self._save_state()
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Metrics) -> None:
        self._log(step, metrics, SentRow(recipe=self._origin.recipe, digest=digest_of(metrics)))

    def send_history(self, before: int | None = None) -> None:
        """Send what wandb lacks of the rows in ``metrics.jsonl``; ``before``: only those of earlier steps."""
        for row in read_jsonl_rows(self._metrics_file):
            step = row.pop("step")
            if before is not None and step >= before:
                return
            digest = digest_of(row)
            self._log(step, row, SentRow(recipe=self._sent.recipe_of(step, digest), digest=digest))

    def _log(self, step: int, metrics: Metrics, row: SentRow) -> None:
        if self._lost:
            return
        if step in self._recorded:
            known = self._sent.of(self.run_id).get(step)
            if known is None or known.digest == row.digest:
                return
            self._branch(step, known, row)
            if self._lost:
                return
        self._sent.add(self.run_id, step, row)  # before it is sent: see `SentRows`
        try:
            self._run.log({"step": step, **metrics, **self._beside(step)}, step=step, commit=True)
        except ConnectionError as error:
            self._give_up(error)
        else:
            self._last_step = max(step, self._last_step)

    def _branch(self, step: int, known: SentRow, row: SentRow) -> None:
        """Leave a run whose row of ``step`` is not the one that has come now."""
        if known.recipe == row.recipe and row.recipe:
            reason = (
                f"the row of step {step} came again with other numbers, though settings, data, actor ranks and devices "
                "are the same: other metrics may be logged now, or something computes differently each time"
            )
            log_line(f"!! wandb: {reason}")
        else:
            reason = _reason(self._origin)
        branch = Branch(parent=self.run_id, step=step - 1, reason=reason)
        self._finish()
        if self._lost:
            return
        run = self._starter.start(branch.run_id(self._origin.recipe, self._log_path), branch)
        if run is None:
            self._lost = True
            return
        _say_branch(run.id, branch)
        self._take(run)
        self.send_history(before=step)

    def _beside(self, step: int) -> dict[str, Any]:
        """What rows of some steps have besides their metrics: a table of responses, the number of restarts."""
        beside: dict[str, Any] = {}
        if rows := samples_of(self._log_path, step):
            table = self._starter.wandb.Table(columns=list(COLUMNS), data=[list(row) for row in rows])
            beside["samples/rollouts"] = table
        if self._history.new(step):
            beside[RESTARTS] = self._history.num_restarts(step)
        return beside

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._finish()
        self._sent.close()

    def _finish(self) -> None:
        from wandb.sdk.mailbox import HandleAbandonedError

        try:
            self._run.finish()
        except (ConnectionError, HandleAbandonedError) as error:
            self._give_up(error)
        if not self._lost:
            # Not before: only now are the rows with wandb, or in its file.
            self._save_state()

    def _give_up(self, error: Exception) -> None:
        if not self._lost:
            log_line(
                f"wandb: its service process is gone ({error!r}); a resume sends what is missing from metrics.jsonl"
            )
        self._lost = True

    def _save_state(self) -> None:
        write_state(self._log_path, WandbState(run_id=self.run_id, last_step=self._last_step))


def open_wandb(
    config: LoggerConfig,
    *,
    committed_step: int | None,
    run_id: str | None,
    config_dict: Mapping[str, Any],
    metrics_file: Path,
    origin: Origin,
) -> WandbSink | None:
    """Start, resume or branch off the wandb run; None, after a notice, where there can be none.

    Args:
        run_id: of the checkpoint; None: the one in the sidecar file, or (in a new run) a new one.
        metrics_file: holds the rows up to the committed step; those that wandb lacks are sent.
        origin: what makes the rows after it.
    """
    try:
        import wandb
    except ImportError:
        log_line("wandb: not installed, so nothing goes there; pip install wandb. metrics.jsonl is written as always")
        return None
    log_path = metrics_file.parent
    log_path.mkdir(parents=True, exist_ok=True)
    if origin.changes:
        config_dict = {**config_dict, f"changed_after_step_{committed_step}": list(origin.changes)}
    starter, sent = Starter(wandb=wandb, config=config, config_dict=config_dict), SentRows(log_path)
    run_id, branch = _choose(log_path, sent, committed_step, run_id, origin)
    run = starter.start(run_id, branch)
    if run is None:
        sent.close()
        return None
    if branch is not None:
        _say_branch(run_id, branch)
    sink = WandbSink(run, starter, metrics_file, sent, origin)
    sink.send_history()
    return sink


def _choose(
    log_path: Path, sent: SentRows, committed_step: int | None, run_id: str | None, origin: Origin
) -> tuple[str, Branch | None]:
    """The id of the run to go on with, and from which it branches off now."""
    sidecar = read_state(log_path)
    known = run_id or (sidecar.run_id if sidecar else None)
    if committed_step is None or known is None:
        return run_id or uuid.uuid4().hex[:12], None
    if not _holds_other_rows(sent.of(known), committed_step, origin):
        return known, None
    branch = Branch(parent=known, step=committed_step, reason=_reason(origin))
    return branch.run_id(origin.recipe, log_path), branch


def _holds_other_rows(rows: Mapping[int, SentRow], committed_step: int, origin: Origin) -> bool:
    """Whether a run has rows after the committed step that will come again with other numbers."""
    if not rows:  # an older version sent them, and did not note what made them
        return bool(origin.changes)
    later = [row.recipe for step, row in rows.items() if step > committed_step]
    unknown = bool(origin.changes)
    return any(recipe != origin.recipe if recipe and origin.recipe else unknown for recipe in later)


def _reason(origin: Origin) -> str:
    return "; ".join(origin.changes) or "its later rows were made with other settings, actor ranks or devices"


def _say_branch(run_id: str, branch: Branch) -> None:
    log_line(f"wandb: run {run_id} branches off run {branch.parent} after step {branch.step}: {branch.reason}")


def _steps_it_has(run: Any, log_path: Path) -> Collection[int]:
    if not run.offline:
        return range(run.starting_step)
    state = read_state(log_path)
    closed = range(state.last_step + 1) if state is not None and state.run_id == run.id else range(0)
    return recorded_steps(log_path / "wandb", run.id) | set(closed)
