"""Computes the texts and tables of the page, as plain values for the template."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlinf_lite import readable
from rlinf_lite.observability.events import BACK, RECOVERED, RECOVERY_SECONDS, RESTART, RESUME, SAVE, START, STOP
from rlinf_lite.report.run import Config, Run, drawable

_LAST_ROWS = 10
_STILL_RUNNING_SECONDS = 600
_CHANGES_EVERY_TIME = ("runner.resume_dir",)
_VERBS = {
    START: "started",
    RESUME: "resumed",
    RESTART: "restarted",
    RECOVERED: "recovered",
    BACK: "went back",
    SAVE: "saved",
    STOP: "stopped",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One figure in the head of the page."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()
    """Columns that are aligned to the right."""


def planned_steps(run: Run) -> int | None:
    """``runner.max_steps``; None if there is no limit."""
    steps = run.setting("runner.max_steps", -1)
    return steps if isinstance(steps, int) and steps > 0 else None


def facts(run: Run) -> Iterator[str]:
    """Facts about the run from its config, as far as they are known."""
    model, precision = run.setting("actor.model.model_path"), run.setting("actor.model.precision")
    if model:
        yield f"model {model}{f', {precision}' if precision else ''}"
    if data := run.setting("data.train_data_paths") or run.setting("data.type"):
        yield f"data {', '.join(map(str, data)) if isinstance(data, list) else data}"
    prompts, responses = run.setting("data.rollout_batch_size"), run.setting("algorithm.group_size")
    if prompts and responses:
        yield f"{prompts} prompts x {responses} responses per step"
    if backend := run.setting("rollout.rollout_backend"):
        yield f"{backend} rollouts"
    yield str(run.directory)


def notices(run: Run) -> Iterator[str]:
    """Warnings about missing or damaged data."""
    if not len(run.steps):
        yield "No step is completed yet: there is nothing to draw."
    if run.num_torn:
        yield f"{run.num_torn} line(s) of metrics.jsonl could not be read and are left out: a kill may damage the last."
    for key, (_, values) in run.columns.items():
        if broken := int((~drawable(values)).sum()):
            yield f"{key} was NaN or infinite in {broken} of {len(values)} rows."


def tiles(run: Run, now: float) -> Iterator[Tile]:
    planned = planned_steps(run)
    done = f"{run.last_step} of {planned}" if planned else str(run.last_step)
    yield Tile(name="Steps", value=done, note=_state(run, planned, now))
    steps, rewards = run.finite("reward/mean")
    if len(rewards):
        recent, best = rewards[-_LAST_ROWS:], int(rewards.argmax())
        note = f"mean of the last {len(recent)}; best {readable.number(float(rewards[best]))} at step {steps[best]}"
        yield Tile(name="Reward", value=readable.number(float(recent.mean())), note=note)
    steps, accuracy = run.finite("val/accuracy")
    if len(accuracy):
        best = int(accuracy.argmax())
        note = f"best {readable.percent(float(accuracy[best]))} at step {steps[best]}"
        yield Tile(name="Validation", value=readable.percent(float(accuracy[-1])), note=note)
    _, seconds = run.finite("time/step")
    if len(seconds):
        started = run.start_time
        note = time.strftime("started %Y-%m-%d %H:%M", time.localtime(started)) if started else ""
        yield Tile(name="Time in steps", value=readable.duration(float(seconds.sum())), note=note)
    _, speed = run.finite("throughput/tokens_per_second")
    if len(speed):
        note = f"median; {readable.duration(float(np.median(seconds)))} per step" if len(seconds) else "median"
        yield Tile(name="Throughput", value=f"{readable.number(float(np.median(speed)))} tok/s", note=note)
    yield Tile(name="Restarts", value=str(len(run.restarts)), note=_longest_recovery(run))
    kept = [*run.kept]
    shown = ", ".join(map(str, kept)) if len(kept) <= 4 else f"{kept[0]} … {kept[-1]}"
    note = f"steps {shown}, {readable.size(sum(run.kept.values()))}" if kept else "none in this directory"
    yield Tile(name="Checkpoints kept", value=str(len(kept)), note=note)


def _state(run: Run, planned: int | None, now: float) -> str:
    if planned and run.last_step >= planned:
        return "finished"
    if run.last_row_time and now - run.last_row_time < _STILL_RUNNING_SECONDS:
        return f"last row {readable.duration(max(0.0, now - run.last_row_time))} ago"
    if run.events and run.events[-1].kind == STOP:
        return f"stopped: {run.events[-1].text}"
    return "not finished"


def _longest_recovery(run: Run) -> str:
    seconds = [event.figures[RECOVERY_SECONDS] for event in run.recoveries if RECOVERY_SECONDS in event.figures]
    return f"longest recovery {readable.duration(max(seconds))}" if seconds else ""


def comparison(runs: Sequence[Run]) -> Table:
    """One row per run."""
    rows = []
    for run in runs:
        rewards, accuracy, seconds = (run.finite(key)[1] for key in ("reward/mean", "val/accuracy", "time/step"))
        rows.append(
            [
                run.name,
                str(run.last_step),
                readable.number(float(rewards[-_LAST_ROWS:].mean())) if len(rewards) else "",
                readable.percent(float(accuracy.max())) if len(accuracy) else "",
                readable.number(float(np.median(seconds))) if len(seconds) else "",
                str(len(run.restarts)),
                str(run.directory),
            ]
        )
    head = ["run", "steps", "reward, last rows", "best validation", "seconds per step", "restarts", "directory"]
    return Table(head=head, rows=rows, numbers=range(1, 6))


def differing_settings(runs: Sequence[Run]) -> Table:
    """The settings, as of each run's last start, that are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in (run.configs[-1].values if run.configs else ()))
    values = {key: [str(run.setting(key, "")) for run in runs] for key in keys}
    rows = [[key, *shown] for key, shown in values.items() if len(set(shown)) > 1]
    return Table(head=["setting", *(f"{run.name} ({run.directory.parent.name})" for run in runs)], rows=rows)


def phases(run: Run, names: Sequence[str]) -> Iterator[tuple[str, float, str, str]]:
    """For each phase: its name, its fraction of the time in steps, and its total and median seconds as text."""
    total = float(run.finite("time/step")[1].sum()) or 1.0
    seconds = {name: run.finite(f"time/{name}")[1] for name in names if name in run.phases}
    other = max(0.0, total - sum(float(each.sum()) for each in seconds.values()))
    for name in names:
        each = seconds.get(name, np.empty(0))
        whole = float(each.sum()) if name in seconds else other
        yield (
            name,
            whole / total,
            readable.duration(whole),
            readable.duration(float(np.median(each))) if len(each) else "",
        )


def save_costs(run: Run) -> Mapping[str, str]:
    """The cost of all saves together; empty if there were none."""
    saves = run.saves
    if not saves:
        return {}
    held = sum(save.stall_seconds for save in saves)
    whole = float(run.finite("time/step")[1].sum()) or 1.0
    return {
        "saves": str(len(saves)),
        "size of the last": readable.size(saves[-1].num_bytes),
        "until durable, median": readable.duration(float(np.median([save.durable_seconds for save in saves]))),
        "speed, median": f"{readable.number(float(np.median([save.gb_per_second for save in saves])))} GB/s",
        "held the run, in total": readable.duration(held),
        "of the time in steps": f"{100 * held / whole:.2f} %",
    }


def events(run: Run) -> Table:
    """All events but saves, which the charts show."""
    rows = [
        [
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time)),
            str(event.step),
            _VERBS.get(event.kind, event.kind),
            f"from {Path(event.text).name}" if event.kind == RESUME else event.text,
        ]
        for event in run.events
        if event.kind != SAVE
    ]
    if not run.events:
        rows = [["", str(mark.step), "resumed", mark.text] for mark in run.restarts]
    return Table(head=["time", "after step", "event", "details"], rows=rows, numbers=(1,))


def config_changes(run: Run) -> Iterator[tuple[str, Table]]:
    """For each resume: the name of its config file, and the settings that it changed."""
    for before, after in zip(run.configs, run.configs[1:], strict=False):
        yield after.name, Table(head=["setting", "before", "after"], rows=list(_changed(before, after)))


def _changed(before: Config, after: Config) -> Iterator[list[str]]:
    for key in {**before.values, **after.values}:
        old, new = before.values.get(key), after.values.get(key)
        if old != new and key not in _CHANGES_EVERY_TIME:
            yield [key, str(old), str(new)]


def settings(run: Run) -> Mapping[str, Any]:
    """All settings of the last start: dotted key -> value."""
    return run.configs[-1].values if run.configs else {}
