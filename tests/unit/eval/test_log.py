"""Rows on disk: complete batches stay, incomplete ones are dropped, another evaluation is refused."""

from __future__ import annotations

import json
import re

import pytest

from rlinf_lite.errors import ConfigError
from rlinf_lite.eval.log import EvalLog

SIZES = [2, 2, 1]


def row(number: int) -> dict:
    return {"problem_id": number, "text": "Grüße\u2028"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "eval.jsonl"


@pytest.fixture
def written(path):
    """The file after two of three batches and a kill."""
    log = EvalLog(path, {"seed": 1}, SIZES)
    log.append([row(0), row(1)])
    log.append([row(2), row(3)])
    log.close()
    return path


def test_it_continues_after_the_last_complete_batch(written):
    whole = written.read_bytes()
    lines = whole.splitlines(keepends=True)
    for torn, num_rows in [(b"", 4), (lines[0][:9], 4), (b'{"problem_id": 4', 4)]:
        written.write_bytes(whole + torn)
        log = EvalLog(written, {"seed": 1}, SIZES)
        assert log.rows == [row(number) for number in range(num_rows)]
        log.close()
        assert written.read_bytes() == whole
    written.write_bytes(b"".join(lines[:3]))
    log = EvalLog(written, {"seed": 1}, SIZES)
    assert log.rows == [row(0), row(1)]
    log.append([row(2), row(3)])
    log.append([row(4)])
    log.finish({"accuracy": 0.5})
    log.close()
    assert [json.loads(line)["problem_id"] for line in written.open()] == [0, 1, 2, 3, 4]
    summary = json.loads((written.parent / "eval.jsonl.summary.json").read_text())
    assert summary == {"settings": {"seed": 1}, "results": {"accuracy": 0.5}}


def test_another_evaluation_is_refused_and_nothing_is_lost(written):
    before = written.read_bytes()
    with pytest.raises(ConfigError, match=r"another evaluation:\n  seed: 1 -> 2\n  top_p: \(absent\) -> 0.5\n.*--over"):
        EvalLog(written, {"seed": 2, "top_p": 0.5}, SIZES)
    assert written.read_bytes() == before
    log = EvalLog(written, {"seed": 2}, SIZES, overwrite=True)
    assert log.rows == [] and written.read_bytes() == b""
    log.close()
    EvalLog(written, {"seed": 2}, SIZES).close()


def test_another_file_is_refused(path):
    path.parent.mkdir()
    path.write_text("notes\n")
    with pytest.raises(ConfigError, match=r"eval\.jsonl: exists, but there is no eval\.jsonl\.summary\.json with"):
        EvalLog(path, {}, SIZES)
    assert path.read_text() == "notes\n"


@pytest.mark.parametrize("line", ["notes\n", '{"problem_id": 7}\n', "[]\n"])
def test_a_line_that_is_no_row_is_named(written, line):
    with written.open("a") as file:
        file.write(line)
    with pytest.raises(ConfigError, match=re.escape("line 5 is not the row of problem 4")):
        EvalLog(written, {"seed": 1}, SIZES)


def test_two_processes_at_a_time_are_refused(path):
    first = EvalLog(path, {"seed": 1}, SIZES)
    with pytest.raises(ConfigError, match=r"another evaluation is writing to it"):
        EvalLog(path, {"seed": 1}, SIZES)
    first.close()
    EvalLog(path, {"seed": 1}, SIZES).close()
