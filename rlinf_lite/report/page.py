"""The page: one HTML file with its charts, style and script inside; it asks no network for anything."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from rlinf_lite import report
from rlinf_lite.observability.samples import ROLLOUTS_FILE
from rlinf_lite.report import sections
from rlinf_lite.report.figures import Bars, Figure, Group, groups, phase_bars, save_figures
from rlinf_lite.report.html import section, text
from rlinf_lite.report.numbers import short
from rlinf_lite.report.run import Mark, Run
from rlinf_lite.report.samples import choose_samples
from rlinf_lite.report.svg import Axis, axis_for, draw, draw_bars


class Charts:
    """Draws, and keeps what the script needs of each chart, in the order of the page.

    Args:
        named: whether read-outs name the curves; where there are several runs the legend does.
    """

    def __init__(self, axis: Axis, *, named: bool) -> None:
        self.axis, self._named = axis, named
        self.data: list[dict[str, Any]] = []

    def figure(self, figure: Figure) -> str:
        svg, data = draw(figure, self.axis)
        if not self._named:
            data["curves"] = [{**each, "label": ""} for each in data["curves"]]
        alone = len(figure.curves) == 1
        named = [
            (f'<i class="swatch c{curve["colour"]}"></i>{text(curve["label"])}', c)
            for curve, c in zip(data["curves"], figure.curves, strict=True)
        ]
        last = [f"{'last' if alone else name} <em>{short(c.last, figure.kind)}</em>" for name, c in named]
        return self._framed(figure.title, " ".join(f"<span>{each}</span>" for each in last), figure.about, svg, data)

    def bars(self, bars: Bars) -> str:
        svg, data = draw_bars(bars, self.axis)
        return self._framed(bars.title, "", "seconds a step; colours as in the table", svg, data)

    def group(self, group: Group) -> str:
        if not group.figures and not group.constant:
            return ""
        grid = "".join(self.figure(figure) for figure in group.figures)
        return f'<div class="grid-of-charts">{grid}</div>{sections.constants(group)}'

    def _framed(self, title: str, last: str, about: str, svg: str, data: dict[str, Any]) -> str:
        self.data.append(data)
        caption = f'<figcaption><b>{text(title)}</b><span class="readout">{last}</span></figcaption>'
        return f'<figure>{caption}<div class="about" title="{text(about)}">{text(about)}</div>{svg}</figure>'


def axis_of(runs: Sequence[Run]) -> Axis | None:
    """None: no run has a step."""
    run = runs[0]
    if not any(len(each.steps) for each in runs):
        return None
    saved = sorted({save.step for save in run.saves} | set(run.kept))
    checkpoints = [Mark(step=step, text=f"global_step_{step}") for step in saved if step <= run.last_step]
    return axis_for([each.steps for each in runs], run.restarts, checkpoints)


def page(runs: Sequence[Run], now: float | None = None) -> str:
    """The report of the first of ``runs``, with the others laid over its charts."""
    run, axis, now = runs[0], axis_of(runs), time.time() if now is None else now
    charts = Charts(axis, named=len(runs) == 1) if axis is not None else None
    samples = choose_samples(run.folder / ROLLOUTS_FILE)
    body = [
        sections.header(run, now),
        sections.comparison(runs),
        "" if charts is None else _charts(charts, runs),
        section("Sample rollouts", sections.sample_table(samples)),
        "" if charts is None else _further(charts, runs),
        section("Config", sections.config(run)),
        time.strftime("<footer>Written %Y-%m-%d %H:%M:%S by rlinf_lite.report</footer>", time.localtime(now)),
    ]
    return _document(run.name, "".join(body), [] if charts is None else charts.data)


def _charts(charts: Charts, runs: Sequence[Run]) -> str:
    """The order of the sections is that of the calls: the script finds a chart's data by its place."""
    run, (learning, optimisation, system, _) = runs[0], groups(runs)
    return "".join(
        [
            sections.legend(runs, len(charts.axis.checkpoints)),
            section("Learning", charts.group(learning)),
            section("Optimisation", charts.group(optimisation)),
            section("Time and memory", _time(charts, run, system)),
            section("Checkpoints and restarts", _saves(charts, run), sections.event_table(run)),
        ]
    )


def _time(charts: Charts, run: Run, system: Group) -> str:
    bars = phase_bars(run)
    if bars is None:
        return charts.group(system)
    drawn = charts.bars(bars) + "".join(charts.figure(figure) for figure in system.figures)
    table = sections.phase_table(run, list(bars.phases))
    return f'<div class="grid-of-charts spaced">{drawn}</div>{table}{sections.constants(system)}'


def _saves(charts: Charts, run: Run) -> str:
    drawn = "".join(charts.figure(figure) for figure in save_figures(run)) + sections.save_summary(run)
    return f'<div class="grid-of-charts spaced">{drawn}</div>' if drawn else ""


def _further(charts: Charts, runs: Sequence[Run]) -> str:
    group = groups(runs)[-1]
    if not (inner := charts.group(group)):
        return ""
    title = f"<summary>What no chart above shows ({len(group.figures) + len(group.constant)})</summary>"
    return section(group.title, f'<details class="fold">{title}{inner}</details>')


def _document(title: str, body: str, data: list[dict[str, Any]]) -> str:
    style, script = (files(report).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # "<" as an escape: nothing in the data can end the element that it is in.
    inner = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:\">"
        f'<link rel="icon" href="data:,"><title>{text(title)} · run report</title><style>\n{style}</style></head>\n'
        f'<body><main>{body}</main>\n<script type="application/json" id="charts">{inner}</script>\n'
        f"<script>\n{script}</script></body></html>\n"
    )
