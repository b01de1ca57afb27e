"""Renders the page: one HTML file that contains plotly.js, the charts and the style, and needs no network."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from rlinf_lite import readable
from rlinf_lite.observability.samples import ROLLOUTS_FILE
from rlinf_lite.printable import replace_surrogates
from rlinf_lite.report import summary
from rlinf_lite.report.figures import Bars, Figure, groups, phase_bars, save_figures
from rlinf_lite.report.plots import PALETTE, Axis, plot
from rlinf_lite.report.run import Run
from rlinf_lite.report.samples import choose_samples

_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters, and those that change the direction of the text around them."""


_SHOWN = {"number": readable.number, "percent": readable.percent, "seconds": readable.duration}
"""How a value of each `Chart.kind` is written."""


class Charts:
    """Collects the charts that the script draws, in the order in which the template adds them."""

    def __init__(self, axis: Axis | None) -> None:
        self._axis = axis
        self.plots: list[dict[str, Any]] = []

    def add(self, figure: Figure | Bars) -> int:
        """Add a chart; returns its number on the page."""
        assert self._axis is not None, "a run without steps has no figures"
        self.plots.append(plot(figure, self._axis))
        return len(self.plots) - 1

    @property
    def json(self) -> Markup:
        # "<" is escaped, so that nothing in the data can end the script element.
        return Markup(json.dumps(self.plots, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def render(runs: Sequence[Run], now: float | None = None) -> str:
    """The page of the first of ``runs`` as HTML, with the curves of the others in the same charts."""
    run, now = runs[0], time.time() if now is None else now
    axis = Axis.of(runs)
    learning, optimisation, system, further = groups(runs)
    samples = choose_samples(run.directory / ROLLOUTS_FILE)
    return _template().render(
        runs=runs,
        run=run,
        summary=summary,
        now=now,
        written=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)),
        charts=Charts(axis),
        has_steps=axis is not None,
        groups={"Learning": learning, "Optimisation": optimisation},
        system=system,
        further=further,
        bars=phase_bars(run),
        saves=save_figures(run),
        samples=[(step, list(rows)) for step, rows in groupby(samples, key=lambda sample: sample.step)],
        palette=PALETTE,
    )


@cache
def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("rlinf_lite", "report"),
        autoescape=True,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = lambda value, kind="number": _SHOWN[kind](value)
    environment.globals |= {"style": _text("rlinf_lite.report", "page.css"), "plotly": _plotly()}
    return environment.get_template("page.html.jinja")


def _text(package: str, name: str) -> Markup:
    return Markup(files(package).joinpath(name).read_text(encoding="utf-8"))


def _plotly() -> Markup:
    # Read from the file, because importing plotly for `plotly.offline.get_plotlyjs` takes seconds.
    return _text("plotly", "package_data/plotly.min.js")


def _clean(value: object) -> object:
    """Replace control characters and half surrogate pairs in everything that the template prints."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _HIDDEN.sub("\ufffd", replace_surrogates(value.replace("\r\n", "\n")))
