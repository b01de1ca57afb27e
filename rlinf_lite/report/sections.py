"""The sections of the page that are no charts: header, comparison, time, events, samples, config."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from rlinf_lite.observability.events import BACK, RECOVERED, RESTART, RESUME, SAVE, START, STOP
from rlinf_lite.report.figures import Group
from rlinf_lite.report.html import folded, section, table, text, tile
from rlinf_lite.report.numbers import duration, short, size
from rlinf_lite.report.run import Run, drawable
from rlinf_lite.report.samples import Sample

_LAST_ROWS = 10
_STILL_RUNNING_SECONDS = 600
_FACTS = (
    "actor.model.model_path",
    "actor.model.precision",
    "data.rollout_batch_size",
    "algorithm.group_size",
    "rollout.rollout_backend",
)
_ALWAYS_DIFFER = ("runner.resume_dir",)
_WORDS = {
    START: "started",
    RESUME: "resumed",
    RESTART: "restarted",
    RECOVERED: "recovered",
    BACK: "went back",
    SAVE: "saved",
    STOP: "stopped",
}


def header(run: Run, now: float) -> str:
    planned = _planned(run)
    share = min(1.0, run.last_step / planned) if planned else 0.0
    bar = f'<div class="progress"><i style="width:{100 * share:.1f}%"></i></div>' if planned else ""
    facts = "".join(f"<span>{text(fact)}</span>" for fact in _facts(run))
    return (
        f'<header><p class="soft">Run report</p><h1>{text(run.name)}</h1><p class="facts">{facts}</p>{bar}'
        f'<div class="tiles">{"".join(_tiles(run, planned, now))}</div>{_notices(run)}</header>'
    )


def _planned(run: Run) -> int | None:
    steps = run.setting("runner.max_steps", -1)
    return steps if isinstance(steps, int) and steps > 0 else None


def _facts(run: Run) -> Iterator[str]:
    """What the config says of the run, as far as it does."""
    model, precision, prompts, responses, backend = (run.setting(key) for key in _FACTS)
    data = run.setting("data.train_data_paths") or run.setting("data.type")
    if model:
        yield f"model {model}{f', {precision}' if precision else ''}"
    if data:
        yield f"data {', '.join(map(str, data)) if isinstance(data, list) else data}"
    if prompts and responses:
        yield f"{prompts} prompts x {responses} responses a step"
    if backend:
        yield f"{backend} rollouts"
    yield str(run.folder)


def _tiles(run: Run, planned: int | None, now: float) -> Iterator[str]:
    yield tile("Steps", f"{run.last_step} of {planned}" if planned else str(run.last_step), _state(run, planned, now))
    _, rewards = run.finite("reward/mean")
    if len(rewards):
        recent = rewards[-_LAST_ROWS:]
        yield tile("Reward", short(float(recent.mean())), f"mean of the last {len(recent)}; best {_best(run)}")
    steps, accuracy = run.finite("val/accuracy")
    if len(accuracy):
        best = int(accuracy.argmax())
        note = f"best {short(float(accuracy[best]), 'percent')} at step {steps[best]}"
        yield tile("Validation", short(float(accuracy[-1]), "percent"), note)
    yield from _cost_tiles(run)
    yield tile("Restarts", str(len(run.restarts)), _lost_seconds(run))
    kept = run.kept
    note = f"steps {_few(list(kept))}, {size(sum(kept.values()))}" if kept else "none in this folder"
    yield tile("Checkpoints kept", str(len(kept)), note)


def _cost_tiles(run: Run) -> Iterator[str]:
    _, seconds = run.finite("time/step")
    if len(seconds):
        started = run.start_time
        note = time.strftime("started %Y-%m-%d %H:%M", time.localtime(started)) if started else ""
        yield tile("Time in steps", duration(float(seconds.sum())), note)
    _, speed = run.finite("throughput/tokens_per_second")
    if len(speed):
        step = f"; {duration(float(np.median(seconds)))} a step" if len(seconds) else ""
        yield tile("Throughput", f"{short(float(np.median(speed)))} tok/s", f"median{step}")


def _state(run: Run, planned: int | None, now: float) -> str:
    if planned and run.last_step >= planned:
        return "finished"
    if run.last_row_time and now - run.last_row_time < _STILL_RUNNING_SECONDS:
        return f"last row {duration(max(0.0, now - run.last_row_time))} ago"
    stopped = next((event.text for event in run.events[::-1] if event.kind in (STOP, RESUME)), None)
    return f"stopped: {stopped}" if run.events and run.events[-1].kind == STOP and stopped else "not finished"


def _best(run: Run) -> str:
    steps, rewards = run.finite("reward/mean")
    best = int(rewards.argmax())
    return f"{short(float(rewards[best]))} at step {steps[best]}"


def _lost_seconds(run: Run) -> str:
    parts = [event.text.removeprefix("recovered in ").split(" s")[0] for event in run.recoveries]
    seconds = [float(part) for part in parts if part.replace(".", "", 1).isdigit()]
    return f"longest recovery {duration(max(seconds))}" if seconds else ""


def _few(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) if len(steps) <= 4 else f"{steps[0]} … {steps[-1]}"


def _notices(run: Run) -> str:
    lines = [] if len(run.steps) else ["No step is completed yet: there is nothing to draw."]
    if run.num_torn:
        lines.append(
            f"{run.num_torn} line(s) of metrics.jsonl are no rows (a kill tears the last one) and are left out."
        )
    for key, (_, values) in run.columns.items():
        if broken := int((~drawable(values)).sum()):
            lines.append(f"{key} was NaN or infinite in {broken} of {len(values)} rows.")
    return "".join(f'<p class="warn">{text(line)}</p>' for line in lines)


def legend(runs: Sequence[Run], num_saves: int) -> str:
    run = runs[0]
    parts = [
        f'<span><i class="swatch c{i % 8}"></i>{text(r.name)} <code>{text(r.folder)}</code></span>'
        for i, r in enumerate(runs)
        if len(runs) > 1
    ]
    if run.restarts:
        parts.append('<span><i class="at-restart"></i>restart</span>')
    if num_saves:
        parts.append('<span><i class="at-saved"></i>checkpoint</span>')
    parts.append("<span>x axis: completed steps; dots are steps, lines a moving mean</span>")
    return f'<p class="legend">{"".join(parts)}</p>'


def comparison(runs: Sequence[Run]) -> str:
    """One row a run, and what their configs differ in."""
    if len(runs) < 2:
        return ""
    head = ["run", "steps", "reward, last rows", "best validation", "seconds a step", "restarts"]
    rows = [
        [
            f'<i class="swatch c{i % 8}"></i>{text(run.name)}',
            str(run.last_step),
            *_compared(run),
            str(len(run.restarts)),
        ]
        for i, run in enumerate(runs)
    ]
    return section("Comparison", table(head, rows, numbers=range(1, 6)), _differing_settings(runs))


def _compared(run: Run) -> list[str]:
    rewards, accuracy, seconds = (run.finite(key)[1] for key in ("reward/mean", "val/accuracy", "time/step"))
    return [
        short(float(rewards[-_LAST_ROWS:].mean())) if len(rewards) else "",
        short(float(accuracy.max()), "percent") if len(accuracy) else "",
        short(float(np.median(seconds))) if len(seconds) else "",
    ]


def _differing_settings(runs: Sequence[Run]) -> str:
    keys = dict.fromkeys(key for run in runs for key in (run.configs[-1].values if run.configs else ()))
    values = {key: [_value(run.setting(key, "")) for run in runs] for key in keys}
    differing = {key: shown for key, shown in values.items() if len(set(shown)) > 1}
    if not differing:
        return ""
    rows = [[f"<code>{text(key)}</code>", *shown] for key, shown in differing.items()]
    names = [text(f"{run.name} ({run.folder.parent.name})") for run in runs]
    inner = table(["setting", *names], rows)
    return f'<details class="fold"><summary>{len(differing)} settings differ</summary>{inner}</details>'


def _value(value: Any) -> str:
    return f"<code>{text(value)}</code>"


def constants(group: Group) -> str:
    if not group.constant:
        return ""
    shown = ", ".join(f"<code>{text(key)}</code> {short(value)}" for key, value in group.constant.items())
    return f'<p class="constant">The same in every step: {shown}</p>'


def phase_table(run: Run, names: Sequence[str]) -> str:
    """What each phase took of the steps' time."""
    _, whole = run.finite("time/step")
    total = float(whole.sum()) or 1.0
    phases = {name: run.finite(f"time/{name}")[1] for name in names if name in run.phases}
    sums = {name: float(seconds.sum()) for name, seconds in phases.items()}
    medians = {name: float(np.median(seconds)) for name, seconds in phases.items() if len(seconds)}
    sums["other"] = max(0.0, total - sum(sums.values()))
    rows = []
    for name in names:
        share, colour = sums[name] / total, f"c{names.index(name) % 8}"
        bar = f'<i class="share {colour}" style="width:{max(0.3, 100 * share):.1f}%"></i>'
        median = duration(medians[name]) if name in medians else ""
        label = f'<i class="swatch {colour}"></i>{text(name)}'
        rows.append([label, f"{100 * share:.1f} %", bar, duration(sums[name]), median])
    return table(["phase", "share", "", "total", "median"], rows, numbers=(1, 3, 4), whole=(0,), name="phases")


def save_summary(run: Run) -> str:
    saves = run.saves
    if not saves:
        return ""
    held, durable = sum(save.stall_seconds for save in saves), [save.durable_seconds for save in saves]
    whole = float(run.finite("time/step")[1].sum()) or 1.0
    sums = {
        "saves": str(len(saves)),
        "size of the last": size(saves[-1].num_bytes),
        "until durable, median": duration(float(np.median(durable))),
        "speed, median": f"{short(float(np.median([save.gb_per_second for save in saves])))} GB/s",
        "held the run, in all": duration(held),
        "of the time in steps": f"{100 * held / whole:.2f} %",
    }
    return f'<dl class="sums">{"".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in sums.items())}</dl>'


def event_table(run: Run) -> str:
    """Everything but saves, which the axes show."""
    events = [event for event in run.events if event.kind != SAVE]
    rows = [
        [
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time)),
            str(event.step),
            text(_WORDS.get(event.kind, event.kind)),
            folded(f"from {Path(event.text).name}" if event.kind == RESUME else event.text),
        ]
        for event in events
    ]
    if not events:
        rows = [["", str(mark.step), "resumed", text(mark.text)] for mark in run.restarts]
    return table(["time", "after step", "", "what"], rows, numbers=(1,), whole=(0, 2), name="events") if rows else ""


def sample_table(samples: Sequence[Sample]) -> str:
    """By step; without scripts all of them are there."""
    if not samples:
        return ""
    steps = sorted({sample.step for sample in samples})
    options = "".join(f'<option value="{s}"{" selected" * (s == steps[-1])}>step {s}</option>' for s in steps)
    picker = (
        '<div class="picker" hidden><button type="button" aria-label="earlier">←</button>'
        f'<select aria-label="step">{options}<option value="all">all {len(steps)} steps</option></select>'
        '<button type="button" aria-label="later">→</button></div>'
    )
    bodies = [_step_body(step, list(of_step)) for step, of_step in groupby(samples, key=lambda sample: sample.step)]
    head = "<th>id</th><th>prompt</th><th>response</th><th class='number'>reward</th>"
    columns = '<colgroup><col class="id"><col><col><col class="reward"></colgroup>'
    return (
        f'{picker}<div class="card"><table class="samples">{columns}<thead><tr>{head}</tr></thead>'
        f"{''.join(bodies)}</table></div>"
    )


def _step_body(step: int, samples: Sequence[Sample]) -> str:
    rows = []
    for sample in samples:
        wrong = f'<div class="warn">{text(sample.error)}</div>' if sample.error else ""
        rows.append(
            f'<tr><td class="soft" data-name="step {step}, id">{sample.prompt_id}.{sample.index}</td>'
            f'<td data-name="prompt">{folded(sample.prompt)}</td>'
            f'<td data-name="response">{folded(sample.response)}{wrong}</td>'
            f'<td class="number" data-name="reward">{short(sample.reward)}</td></tr>'
        )
    return f'<tbody class="step" data-step="{step}">{"".join(rows)}</tbody>'


def config(run: Run) -> str:
    """The last start's config, and what each start changed."""
    if not run.configs:
        return ""
    changes = "".join(_changes(before, after) for before, after in zip(run.configs, run.configs[1:], strict=False))
    last = run.configs[-1]
    rows = "".join(f"<div><span>{text(k)}</span><code>{text(v)}</code></div>" for k, v in last.values.items())
    summary = f"<summary>{len(last.values)} settings of {text(last.name)}</summary>"
    return f'{changes}<details class="fold">{summary}<div class="config">{rows}</div></details>'


def _changes(before: Any, after: Any) -> str:
    keys = [key for key in {**before.values, **after.values} if key not in _ALWAYS_DIFFER]
    changed = [key for key in keys if before.values.get(key) != after.values.get(key)]
    if not changed:
        return f'<p class="soft">{text(after.name)}: nothing was changed</p>'
    rows = [[f"<code>{text(k)}</code>", _value(before.values.get(k)), _value(after.values.get(k))] for k in changed]
    return f"<p>{text(after.name)} changed:</p>{table(['setting', 'before', 'after'], rows)}"
