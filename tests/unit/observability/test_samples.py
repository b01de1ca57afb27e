"""Tables of responses: which steps have one, their rows, and escaped texts."""

from __future__ import annotations

import json

import markdown
import pytest

from rlinf_lite.observability import JsonlSink
from rlinf_lite.observability.jsonl import rows_of_step
from rlinf_lite.observability.samples import markdown_table, prompt_of, samples_of, to_markdown

HURTS = 'a|b\n<script>alert(1)</script> *x* `y` $z$ &amp; ü 漢 [l](http://x) \\ "q"'


def write(directory, rows_by_step, **extra) -> None:
    sink = JsonlSink(directory / "rollouts.jsonl", committed_step=None)
    for step, number in rows_by_step.items():
        rows = [
            {"prompt_id": step, "sample": i, "prompt_ids": [1, 2], "text": "x" * (step % 7) + HURTS, "reward": 0.5}
            for i in range(number)
        ]
        sink.log_rows(step, [row | extra for row in rows])
    sink.close()


def test_the_first_step_and_every_tenth_have_a_table_of_eight_rows(tmp_path):
    write(tmp_path, dict.fromkeys(range(1, 25), 12), prompt="1+1=")
    assert [step for step in range(1, 25) if samples_of(tmp_path, step)] == [1, 10, 20]
    rows = samples_of(tmp_path, 10)
    assert len(rows) == 8
    assert rows[3] == {
        "step": 10,
        "prompt_id": 10,
        "sample": 3,
        "prompt": "1+1=",
        "response": "xxx" + HURTS,
        "reward": 0.5,
    }


def test_the_score_of_each_function_has_a_column(tmp_path):
    sink = JsonlSink(tmp_path / "rollouts.jsonl", committed_step=None)
    row = {"prompt_id": 0, "sample": 0, "prompt_ids": [1], "text": "2"}
    graded = {"reward": 0.9, "reward/correct": 1.0, "reward/brevity": -0.5, "error": None}
    sink.log_rows(1, [row | {"reward": None, "error": "failed"}, row | graded])
    sink.close()
    ungraded, found = samples_of(tmp_path, 1)
    assert list(found.items())[-3:] == [("reward", 0.9), ("reward/correct", 1.0), ("reward/brevity", -0.5)]
    assert list(ungraded.items())[-3:] == [("reward", None), ("reward/correct", None), ("reward/brevity", None)]


def test_without_rollouts_there_is_no_table(tmp_path):
    assert samples_of(tmp_path, 10) == []


def test_rows_of_any_length_and_with_gaps_are_found(tmp_path):
    steps = {1: 3, 2: 1, 5: 4, 6: 1, 30: 2, 31: 7}
    write(tmp_path, steps)
    path = tmp_path / "rollouts.jsonl"
    for step in range(40):
        found = rows_of_step(path, step, 3)
        assert [row["step"] for row in found] == [step] * min(3, steps.get(step, 0)), step
        assert [row["sample"] for row in found] == list(range(len(found)))


@pytest.mark.parametrize("cut", range(1, 40))
def test_an_incomplete_last_row_is_left_out(tmp_path, cut):
    write(tmp_path, {1: 2, 10: 2})
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [row["sample"] for row in rows_of_step(path, 10, 8)] == [0]


def test_rows_without_their_prompt_show_its_ids():
    assert prompt_of({"prompt_ids": [1, 9, 13]}) == "tokens 1 9 13"
    assert prompt_of({"prompt_ids": [1], "prompt": "1+1="}) == "1+1="


def test_texts_are_escaped():
    html = markdown.markdown(markdown_table([{"step": 1, "response": HURTS, "reward": 0.5}]), extensions=["tables"])
    assert html.count("<tr>") == 2 and html.count("<td>") == 3
    for markup in ("<script", "<em>", "<code>", "<a "):
        assert markup not in html
    assert "&#60;script&#62;" in html and "漢" in html


def test_half_a_surrogate_pair_can_be_written():
    broken = json.loads('"\\ud83d"')
    assert to_markdown(broken).encode() == b"&#63;"


def test_long_texts_are_truncated_with_their_length():
    assert "&#46;&#46;&#46; &#40;5000 characters&#41;" in markdown_table([{"response": "x" * 5000}])
