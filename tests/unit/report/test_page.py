"""The page: its content, escaped texts, its size, and incomplete runs."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from rlinf_lite.observability import JsonlSink
from rlinf_lite.report.__main__ import main
from rlinf_lite.report.figures import extremes, moving_average
from rlinf_lite.report.page import render, samples
from rlinf_lite.report.run import Column, read_run


class Reader(HTMLParser):
    """Collects elements by name and text by element, and checks that elements are closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags]

    @property
    def charts(self) -> list[dict]:
        return [json.loads(attributes["data-plot"]) for _, attributes in self.found if "data-plot" in attributes]


def report(directory, *others) -> Reader:
    html = render([read_run(path) for path in (directory, *others)])
    html.encode()
    return Reader(html)


def append(path, *lines: str) -> None:
    with path.open("a") as file:
        file.writelines(lines)


def test_the_content_of_the_page(run):
    found = report(run)
    assert found.text("h1") == ["<run>"]
    assert {"Learning", "Optimisation", "Time and memory", "Checkpoints and restarts", "Sample rollouts", "Config"} <= (
        set(found.text("h2"))
    )
    titles = found.text("b")
    assert {"30 of 40", "Reward", "Validation accuracy", "Loss", "Entropy", "Time by phase", "Memory"} <= set(titles)
    assert "strange/<b>metric" in titles
    assert "Learning rate" not in titles and "optim/lr" in found.text("code"), "it never changed: told in words"
    reward = found.charts[0]["data"][0]
    assert reward["x"] == list(range(1, 31)) and reward["y"][1] == 0.5
    assert "longest recovery 1.22 s" in found.text("span")
    assert {"restart", "recovered", "resume"} <= set(found.text("span", "td"))
    marks = next(text for text in found.text("script") if "const marks" in text)
    assert '{"range":[0.5,30.5],"restarts":[20.5,20.5],"checkpoints":[10,20]}' in marks
    assert "config.from_step_20.yaml changed:" in found.text("p") and "runner.hang_timeout" in found.text("code")
    # Of the samples, long texts are folded, and errors are shown.
    assert "the verifier <i>died</i>" in found.text("div")
    assert "brevity -0.5" in found.text("div")
    assert {"none", "0.25"} <= set(found.text("td")) and sum(tag == "details" for tag, _ in found.found) > 20


def test_texts_are_escaped_and_the_page_needs_no_network(run):
    found = report(run)
    assert sum(tag == "script" for tag, _ in found.found) == 2, "plotly.js and our own"
    assert not [tag for tag, _ in found.found if tag in ("img", "iframe")]
    pointers = [value for _, attributes in found.found for key, value in attributes.items() if key in ("src", "href")]
    assert pointers == ["data:,"]
    assert any("default-src 'none'" in attributes.get("content", "") for _, attributes in found.found)
    shown = "".join(found.text("div", "summary", "span"))
    assert "</script><script>document.title='broken'</script>" in shown and "漢 😀" in shown
    assert "\u202e" not in shown and "\x00" not in shown


def test_samples_are_spread_from_the_first_to_the_last_step(make_run):
    chosen = samples(read_run(make_run("long", 200)))
    assert min(chosen) == 1 and max(chosen) == 200 and len(chosen) == 20 and max(np.diff([*chosen])) <= 11
    assert [row["sample"] for row in chosen[1]] == [0, 1, 2, 3]


@pytest.mark.parametrize("place", [0, 2, -1])
def test_a_damaged_line_leaves_out_one_sample(make_run, place):
    run = make_run("short", 10)
    path = run / "rollouts.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[place] = b"\0" * 20 + b"\n"
    lines.insert(3, lines[3].split(b", ")[0] + b"}\n")  # a row that only has a step
    path.write_bytes(b"".join(lines))
    assert sum(len(rows) for rows in samples(read_run(run)).values()) == 39


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


def test_a_run_without_rows_has_a_notice(run):
    (run / "metrics.jsonl").write_text("")
    assert "No step is completed yet: there is nothing to draw." in report(run).text("p")


def test_damaged_rows_and_values_that_are_not_finite_have_notices(run):
    append(
        run / "metrics.jsonl",
        '{"step": 31, "loss/total": NaN, "reward/mean": Infinity, "time/step": NaN, "val/accuracy": NaN}\n',
        '{"step": 32, "loss/total": 1e308}\n',  # the length of an axis would overflow
        '{"step": 33, "loss',
    )
    notices = report(run).text("p")
    assert "loss/total was NaN or infinite in 2 of 32 rows." in notices
    assert [line for line in notices if line.startswith("1 line(s) of metrics.jsonl could not be read")]


def test_runs_are_compared(make_run):
    first, second = make_run("first", 30), make_run("second", 20, lr=2e-4)
    found = report(first, second)
    assert "Comparison" in found.text("h2")
    assert {"actor.optim.lr", "0.0002"} <= set(found.text("code"))
    dots = [trace for trace in found.charts[0]["data"] if trace["mode"] == "markers"]
    names = [f"{path.parent.name}/{path.name}" for path in (first, second)]
    assert [(trace["name"], len(trace["x"])) for trace in dots] == [(names[0], 30), (names[1], 20)]


def test_no_spike_is_lost_among_100_000_points():
    values = np.zeros(100_000)
    values[77_777], values[3] = 5.0, -7.0
    steps, thin = extremes(Column(np.arange(100_000), values))
    assert len(thin) <= 1000 and (np.diff(steps) > 0).all()
    assert thin[steps == 77_777] == 5.0 and thin[steps == 3] == -7.0


def test_the_average_of_a_straight_line_is_straight_except_at_its_ends():
    steps, smooth = moving_average(Column(np.arange(200), 3.0 * np.arange(200)))
    assert len(steps) == 200 and smooth[10:-10] == pytest.approx(3.0 * steps[10:-10])
    assert abs(smooth[0]) <= 20 and abs(smooth[-1] - 597) <= 20


@pytest.mark.parametrize("num_rows", [2_000, pytest.param(50_000, marks=pytest.mark.soak)])
def test_a_page_of_many_steps_and_long_responses_is_below_6_mb(tmp_path, num_rows):
    values = np.random.default_rng(0).random((num_rows, 30))
    rows = (
        {"step": step, **dict(zip(map(str, range(30)), row, strict=True))} for step, row in enumerate(values.tolist())
    )
    append(tmp_path / "metrics.jsonl", *(f"{json.dumps(row)}\n" for row in rows))
    row = {"prompt_id": 0, "sample": 0, "prompt_ids": [], "prompt": "<漢" * 3_000, "text": "<漢" * 3_000, "reward": 1.0}
    steps = np.linspace(0, num_rows - 1, 20).round().astype(int).tolist()
    append(tmp_path / "rollouts.jsonl", *(json.dumps({"step": step, **row}) + "\n" for step in steps for _ in range(8)))
    html = render([read_run(tmp_path)])
    assert len(html.encode()) < 6_000_000
    assert html.count("data-plot=") == 30 and "&lt;漢" in html


def test_the_command(run, tmp_path, capsys):
    assert main([str(run), "--output", str(tmp_path / "out")]) == 0
    assert re.search(r"out/report\.html \(2\.\d+ MB\)", capsys.readouterr().out)
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
    assert not (run / "report").exists()


def test_the_command_without_a_run(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: not the directory of a run (no metrics.jsonl, no")
