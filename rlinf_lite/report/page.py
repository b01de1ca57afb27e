"""Renders the page: one HTML file that contains plotly.js, the charts and the style, and needs no network."""

from __future__ import annotations

import base64
import gzip
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup, escape

from rlinf_lite import readable
from rlinf_lite.observability.jsonl import rows_of_step
from rlinf_lite.observability.samples import ROLLOUTS_FILE, prompt_of
from rlinf_lite.printable import replace_surrogates
from rlinf_lite.report.figures import PALETTE, marks, phase_figure, phase_seconds, save_figure, sections
from rlinf_lite.report.run import Run

_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters, and those that change the direction of the text around them."""
_LONGEST_TEXT = 6000
_ROWS_PER_STEP = 8
_MOST_SAMPLE_BYTES = 2_500_000
"""Limit on the samples of the page together, which as a whole stays below 6 MB."""


def render(runs: Sequence[Run]) -> str:
    """The page of the first of ``runs`` as HTML, with the curves of the others in the same charts."""
    run = runs[0]
    phases = phase_seconds(run)
    return _template().render(
        runs=runs,
        run=run,
        sections=sections(runs),
        phases=phases,
        phase_figure=phase_figure(run, phases) if phases else None,
        save_figure=save_figure(run) if run.saves else None,
        marks=marks(runs),
        samples=samples(run),
        palette=PALETTE,
        now=time.time(),
    )


def samples(run: Run) -> dict[int, list[dict[str, Any]]]:
    """Step -> the first rows of ``rollouts.jsonl``, for up to 20 steps including the first and the last."""
    chosen: dict[int, list[dict[str, Any]]] = {}
    for num_steps in (20, 10, 5, 2):
        places = np.linspace(0, len(run.steps) - 1, min(num_steps, len(run.steps))).round().astype(int)
        chosen = {step: list(_rows(run, step)) for step in run.steps[places].tolist()}
        texts = (row[key] for rows in chosen.values() for row in rows for key in ("prompt", "text"))
        if sum(len(escape(text).encode("utf-8", "replace")) for text in texts) <= _MOST_SAMPLE_BYTES:
            break
    return {step: rows for step, rows in chosen.items() if rows}


def _rows(run: Run, step: int) -> Iterator[dict[str, Any]]:
    for row in rows_of_step(run.directory / ROLLOUTS_FILE, step, _ROWS_PER_STEP):
        if row.keys() >= {"prompt_id", "sample", "prompt_ids", "text", "reward"}:  # else a damaged row
            texts = {"prompt": prompt_of(row), "text": row["text"]}
            short = {key: f"{text[:_LONGEST_TEXT]}{' …' * (len(text) > _LONGEST_TEXT)}" for key, text in texts.items()}
            yield row | short


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The settings that are not the same in all configs: dotted key -> the value in each."""
    keys = dict.fromkeys(key for config in configs for key in config if key != "runner.resume_dir")
    values = {key: [str(config.get(key, "")) for config in configs] for key in keys}
    return {key: each for key, each in values.items() if len(set(each)) > 1}


@cache
def _template() -> Template:
    page = Environment(
        loader=PackageLoader("rlinf_lite", "report"),
        autoescape=True,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    page.filters |= {
        "number": readable.number,
        "percent": readable.percent,
        "duration": readable.duration,
        "size": readable.size,
        "median": np.median,
        "time": lambda seconds: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)),
    }
    # Read from its file, because importing plotly takes seconds; compressed, because it is most of the page.
    plotly = gzip.compress(files("plotly").joinpath("package_data/plotly.min.js").read_bytes(), 6, mtime=0)
    style = files("rlinf_lite.report").joinpath("page.css").read_text(encoding="utf-8")
    page.globals |= {
        "style": Markup(style),
        "plotly": base64.b64encode(plotly).decode(),
        "differences": differences,
    }
    return page.get_template("page.html.jinja")


def _clean(value: object) -> object:
    """Replace control characters and half surrogate pairs in everything that the template prints."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _HIDDEN.sub("\ufffd", replace_surrogates(value.replace("\r\n", "\n")))
