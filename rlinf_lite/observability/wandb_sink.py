"""Sends metrics to wandb, online or offline, so that its run shows the rows of ``metrics.jsonl`` across kills.

Rows cannot be removed from wandb. A resume reads which steps wandb has (from the server or the offline files), sends
the missing rows from ``metrics.jsonl`` (their tables of responses from ``rollouts.jsonl``), and skips repeated rows
that are equal. If a repeated row differs, a new wandb run branches off before it. It never prompts and never stops a
run.
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
from rlinf_lite.observability.samples import samples_of
from rlinf_lite.observability.sinks import Metrics
from rlinf_lite.observability.wandb_file import recorded_steps, wait_until_finished
from rlinf_lite.observability.wandb_rows import SentRow, SentRows, digest_of
from rlinf_lite.observability.wandb_start import Branch, Starter
from rlinf_lite.observability.wandb_state import WandbState, read_state, write_state


class WandbSink:
    """Sends each step once to the wandb run that it belongs to.

    Args:
        run: what ``wandb.init`` returned.
        starter: starts the run of a branch.
        metrics_file: the file from which rows that a run lacks are read.
        sent: the rows sent so far; closed with the sink.
        origin: what decides the numbers of the next rows.
    """

    def __init__(self, run: Any, starter: Starter, metrics_file: Path, sent: SentRows, origin: Origin) -> None:
        self._starter, self._metrics_file, self._log_path = starter, metrics_file, metrics_file.parent
        self._sent, self._origin = sent, origin
        self._lost = self._closed = False
        self._use(run)

    def _use(self, run: Any) -> None:
        self.run_id: str = run.id
        self._run = run
        self._recorded = _recorded_by(run, self._log_path)
        self._last_step = max(self._recorded, default=-1)
        self._history = History(self._log_path / EVENTS_FILE, committed_step=0)
        self._save_state()
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Metrics) -> None:
        self._log(step, metrics, SentRow(recipe=self._origin.recipe, digest=digest_of(metrics)))

    def send_history(self, before: int | None = None) -> None:
        """Send the rows of ``metrics.jsonl`` that wandb lacks; with ``before``, only those of earlier steps."""
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
            self._run.log({"step": step, **metrics, **self._extras(step)}, step=step, commit=True)
        except ConnectionError as error:
            self._give_up(error)
        else:
            self._last_step = max(step, self._last_step)

    def _branch(self, step: int, known: SentRow, row: SentRow) -> None:
        """Leave a run whose row of ``step`` differs from the new one, for a new run that branches off before it."""
        if known.recipe == row.recipe and row.recipe:
            reason = (
                f"the row of step {step} was logged again with other numbers, though settings, data, actor ranks and "
                "devices are the same: other metrics may be logged now, or a computation is not deterministic"
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
        _log_branch(run.id, branch)
        self._use(run)
        self.send_history(before=step)

    def _extras(self, step: int) -> dict[str, Any]:
        """What a step shows besides its metrics: a table of responses, the number of restarts."""
        extras: dict[str, Any] = {}
        if rows := samples_of(self._log_path, step):
            table = self._starter.wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
            extras["samples/rollouts"] = table
        if self._history.new(step):
            extras[RESTARTS] = self._history.num_restarts(step)
        return extras

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
            if self._run.offline and not wait_until_finished(Path(self._run.settings.sync_file)):
                log_line(f"!! wandb: the last rows of run {self.run_id} are not in its offline file yet")
        except (ConnectionError, HandleAbandonedError) as error:
            self._give_up(error)
        if not self._lost:
            # Only now are all rows on the server or in the offline file.
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
    """Start, resume or branch off the wandb run. Returns None, after a log line, if wandb cannot be used.

    Args:
        run_id: wandb run in the checkpoint; None to use the one in the state file or, in a new run, a new one.
        metrics_file: holds the rows up to the committed step; those that wandb lacks are sent.
        origin: what decides the numbers of the rows after it.
    """
    try:
        import wandb
    except ImportError:
        log_line("wandb: not installed, so nothing is sent; pip install wandb. metrics.jsonl is written as always")
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
        _log_branch(run_id, branch)
    sink = WandbSink(run, starter, metrics_file, sent, origin)
    sink.send_history()
    return sink


def _choose(
    log_path: Path, sent: SentRows, committed_step: int | None, run_id: str | None, origin: Origin
) -> tuple[str, Branch | None]:
    """The id of the wandb run to use, and how it branches off another one (None if it does not)."""
    state = read_state(log_path)
    known = run_id or (state.run_id if state else None)
    if committed_step is None or known is None:
        return run_id or uuid.uuid4().hex[:12], None
    if not _holds_other_rows(sent.of(known), committed_step, origin):
        return known, None
    branch = Branch(parent=known, step=committed_step, reason=_reason(origin))
    return branch.run_id(origin.recipe, log_path), branch


def _holds_other_rows(rows: Mapping[int, SentRow], committed_step: int, origin: Origin) -> bool:
    """Whether a run has rows after the committed step that will be logged again with other numbers."""
    if not rows:  # an older version sent them without recording their recipes
        return bool(origin.changes)
    later = [row.recipe for step, row in rows.items() if step > committed_step]
    unknown = bool(origin.changes)
    return any(recipe != origin.recipe if recipe and origin.recipe else unknown for recipe in later)


def _reason(origin: Origin) -> str:
    return "; ".join(origin.changes) or "its later rows come from other settings or devices"


def _log_branch(run_id: str, branch: Branch) -> None:
    log_line(f"wandb: run {run_id} branches off run {branch.parent} after step {branch.step}: {branch.reason}")


def _recorded_by(run: Any, log_path: Path) -> Collection[int]:
    """The steps that a wandb run has: from the server or, offline, from its files."""
    if not run.offline:
        return range(run.starting_step)
    state = read_state(log_path)
    closed = range(state.last_step + 1) if state is not None and state.run_id == run.id else range(0)
    return recorded_steps(log_path / "wandb", run.id) | set(closed)
