"""The page: its content, escaped texts, and incomplete runs."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from rlinf_lite.observability import JsonlSink
from rlinf_lite.report.__main__ import main
from rlinf_lite.report.page import render
from rlinf_lite.report.run import read_run
from rlinf_lite.report.samples import choose_samples


class Reader(HTMLParser):
    """Collects elements by name and text by element, and checks that elements are closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "col", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags]


def report(directory, *others) -> Reader:
    html = render([read_run(path) for path in (directory, *others)])
    html.encode()
    reader = Reader(html)
    assert reader.open == []
    return reader


def charts_of(found: Reader) -> list[dict]:
    return json.loads(next(text for tag, text in found.texts if tag == "script"))


def test_the_content_of_the_page(run):
    found = report(run)
    assert found.text("h1") == ["<run>"]
    assert {"Learning", "Optimisation", "Time and memory", "Checkpoints and restarts", "Sample rollouts", "Config"} <= (
        set(found.text("h2"))
    )
    titles = [text for tag, text in found.texts if tag == "b"]
    assert {"30 of 40", "Reward", "Validation accuracy", "Loss", "Entropy", "Time by phase", "Memory"} <= set(titles)
    assert "Training accuracy" not in titles, "it repeats the reward"
    assert "Learning rate" not in titles, "it never changed, so it is told in words"
    assert "strange/<b>metric" in titles
    assert all(len(chart["layout"]["shapes"]) == 2 for chart in charts_of(found)), "each shows both restarts"
    assert {"hang_timeout" in code for code in found.text("code")} == {True, False}


def test_each_chart_has_its_values(run):
    found = report(run)
    charts = charts_of(found)
    places = [attributes["data-chart"] for _, attributes in found.found if "data-chart" in attributes]
    assert places == [str(index) for index in range(len(charts))] and len(charts) > 6
    reward = charts[0]["data"][0]
    assert reward["x"] == list(range(1, 31)) and reward["y"][1] == 0.5


def test_plotly_knows_every_attribute_that_a_chart_sets(run):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for chart in charts_of(report(run)):
        graph_objects.Figure(data=chart["data"], layout=chart["layout"])  # raises for an unknown attribute


def test_texts_are_escaped(run):
    found = report(run)
    assert sum(tag == "script" for tag, _ in found.found) == 3, "the data, plotly.js and our own"
    assert not [tag for tag, _ in found.found if tag in ("img", "iframe")]
    # Style and scripts are inside the page: it links to nothing.
    pointers = [value for _, attributes in found.found for key, value in attributes.items() if key in ("src", "href")]
    assert pointers == ["data:,"]
    shown = "".join(text for tag, text in found.texts if tag in ("div", "summary", "span"))
    assert "</script><script>document.title='broken'</script>" in shown and "漢 😀" in shown
    assert "\u202e" not in shown and "\x00" not in shown


def test_samples_are_spread_from_the_first_to_the_last_step(run, make_run):
    samples = choose_samples(make_run("long", 200) / "rollouts.jsonl")
    steps = sorted({sample.step for sample in samples})
    assert steps[0] == 1 and steps[-1] == 200 and len(steps) == 40 and max(np.diff(steps)) <= 6
    assert [s.index for s in samples if s.step == 1] == [0, 1, 2, 3]
    assert choose_samples(run / "none.jsonl") == []


@pytest.mark.parametrize("place", [0, 2, -1])
def test_a_damaged_line_leaves_out_one_sample(run, place):
    path = run / "rollouts.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    whole = len(choose_samples(path))
    lines[place] = b"\0" * 20 + b"\n"
    lines.insert(3, lines[3].split(b", ")[0] + b"}\n")  # a row that only has a step
    path.write_bytes(b"".join(lines))
    assert len(choose_samples(path)) == whole - 1
    assert report(run).text("h1") == ["<run>"]


def test_values_that_overflow_an_axis_are_left_out(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss/total": 1e308}\n{"step": 32, "loss/total": -1e308}\n')
    assert report(run).text("h1") == ["<run>"]


def test_long_texts_are_folded_and_errors_are_shown(run):
    found = report(run)
    assert sum(tag == "details" for tag, _ in found.found) > 30
    assert "the verifier <i>died</i>" in found.text("div")
    assert {"none", "0.25"} <= set(found.text("td"))


def test_a_run_without_rows_has_a_notice(run):
    (run / "metrics.jsonl").write_text("")
    (run / "rollouts.jsonl").unlink()
    assert "No step is completed yet: there is nothing to draw." in report(run).text("p")


@pytest.mark.parametrize("missing", ["config.yaml", "rollouts.jsonl", "events.jsonl", "checkpoints"])
def test_an_incomplete_run_has_a_page(run, missing):
    (run / missing).rename(run / "elsewhere")
    assert report(run).text("h1") == ["<run>"]


def test_metrics_alone_have_a_page(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl", committed_step=None)
    sink.log(1, {"reward/mean": 0.5})
    sink.close()
    found = report(tmp_path)
    assert found.text("h1") == [tmp_path.name] and "Reward" in found.text("b")


def test_values_that_are_not_finite_have_a_notice(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss/total": NaN, "reward/mean": Infinity, "time/step": NaN, "val/accuracy": NaN}\n')
    assert "loss/total was NaN or infinite in 1 of 31 rows." in report(run).text("p")


def test_a_damaged_row_has_a_notice(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss')
    assert [line for line in report(run).text("p") if line.startswith("1 line(s) of metrics.jsonl could not be read")]


def test_runs_are_compared(make_run):
    first, second = make_run("first", 30), make_run("second", 20, lr=2e-4)
    found = report(first, second)
    assert "Comparison" in found.text("h2")
    assert "actor.optim.lr" in found.text("code")
    lines = [trace for trace in charts_of(found)[0]["data"] if trace.get("mode") == "markers" and "yaxis" not in trace]
    assert [(trace["name"], len(trace["x"])) for trace in lines] == [("<first>", 30), ("<second>", 20)]


@pytest.mark.parametrize("rows", [20_000, pytest.param(100_000, marks=pytest.mark.soak)])
def test_a_page_of_many_steps_takes_seconds_and_is_below_6_mb(tmp_path, rows):
    values = np.random.default_rng(0).random((rows, 6))
    keys = ["reward/mean", "loss/total", "policy/entropy", "time/step", "time/rollout", "throughput/tokens_per_second"]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"step": step + 1, **dict(zip(keys, row, strict=True))}) + "\n"
            for step, row in enumerate(values.tolist())
        )
    began = time.process_time()
    html = render([read_run(tmp_path)])
    assert time.process_time() - began < 30
    assert len(html.encode()) < 6_000_000


def test_the_command(run, tmp_path, capsys):
    assert main([str(run), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"out/report\.html \(4\.\d+ MB\)", said)
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
    assert not (run / "report").exists()


def test_the_command_without_a_run(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: not the directory of a run (no metrics.jsonl, no")
