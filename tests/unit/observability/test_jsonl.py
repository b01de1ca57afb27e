"""The file of rows across kills, resumes and new runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from rlinf_lite.observability import JsonlSink, read_jsonl_rows


def write(path, committed_step, *steps) -> None:
    sink = JsonlSink(path, committed_step=committed_step)
    for step in steps:
        sink.log(step, {"reward/mean": step / 3})
    sink.close()


def steps(path) -> list[int]:
    return [row["step"] for row in read_jsonl_rows(path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "metrics.jsonl"


def test_floats_read_back_exactly(path):
    sink = JsonlSink(path, committed_step=None)
    sink.log(7, {"reward/mean": 0.1 + 0.2, "progress/tokens": 2**60, "policy/kl": float("nan")})
    sink.close()
    sink.close()
    assert path.read_text().startswith('{"step": 7, "reward/mean": 0.30000000000000004, ')
    (row,) = read_jsonl_rows(path)
    assert row["reward/mean"] == 0.1 + 0.2 and row["progress/tokens"] == 2**60 and math.isnan(row["policy/kl"])


def test_a_row_is_in_the_file_before_log_returns(path):
    sink = JsonlSink(path, committed_step=None)
    sink.log(1, {"a": 1})
    assert path.read_bytes() == b'{"step": 1, "a": 1}\n'
    sink.close()


def test_a_resume_drops_later_rows_only(path):
    write(path, None, *range(1, 11))
    before = path.read_bytes().splitlines(keepends=True)
    write(path, 6)
    assert path.read_bytes() == b"".join(before[:6])
    write(path, 6, *range(7, 13))
    assert steps(path) == list(range(1, 13))


@pytest.mark.parametrize("cut", range(1, len('{"step": 3, "reward/mean": 1.0}\n')))
def test_an_incomplete_last_line_is_dropped(path, cut):
    write(path, None, 1, 2, 3)
    os.truncate(path, path.stat().st_size - cut)
    write(path, 2, 3, 4)
    assert [row["reward/mean"] for row in read_jsonl_rows(path)] == [step / 3 for step in (1, 2, 3, 4)]


def test_a_last_line_without_newline_is_dropped(path):
    write(path, None, 1, 2, 3)
    os.truncate(path, path.stat().st_size - 1)
    write(path, 3, 4)
    assert steps(path) == [1, 2, 4]


def test_zeros_at_the_end_are_dropped(path):
    write(path, None, 1, 2)
    with path.open("ab") as file:
        file.write(b"\0" * 100 + b"\n[3]\n{}\n")
    write(path, 2, 3)
    assert steps(path) == [1, 2, 3]


def test_without_rows_to_drop_the_file_is_not_rewritten(path):
    write(path, None, 1, 2, 3)
    inode = path.stat().st_ino
    write(path, 3)
    assert path.stat().st_ino == inode
    write(path, 2)
    assert path.stat().st_ino != inode
    assert [child.name for child in path.parent.iterdir()] == ["metrics.jsonl"], "nothing is left lying about"


def test_several_rows_per_step_and_steps_out_of_order(path):
    sink = JsonlSink(path, committed_step=0)
    for step in (1, 2, 3):
        sink.log_rows(step, [{"sample": sample, "text": f'"step": 9\u2028{step}'} for sample in range(4)])
    sink.log(1, {"sample": 9})
    sink.close()
    JsonlSink(path, committed_step=2).close()
    kept = [(row["step"], row["sample"]) for row in read_jsonl_rows(path)]
    assert kept == [(step, sample) for step in (1, 2) for sample in range(4)] + [(1, 9)]


def test_rows_of_other_writers_are_read(path):
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"a": 1, "step": step}) + "\n" for step in (1, 2, 3)))
    JsonlSink(path, committed_step=2).close()
    assert steps(path) == [1, 2]


def test_a_new_run_renames_the_old_file_with_a_log_line(path, capsys):
    write(path, None, 1, 2)
    write(path, None, 1)
    write(path, None, 5)
    assert steps(path) == [5]
    assert steps(path.with_name("metrics.old1.jsonl")) == [1, 2]
    assert steps(path.with_name("metrics.old2.jsonl")) == [1]
    assert "metrics.jsonl: a new run starts here; the rows of an earlier run are now in metrics.old1.jsonl" in (
        capsys.readouterr().out
    )


def test_a_leftover_of_an_interrupted_rewrite_is_ignored(path):
    write(path, None, 1, 2, 3)
    path.with_name("metrics.jsonl.tmp").write_text("half a rewr")
    write(path, 2, 3)
    assert steps(path) == [1, 2, 3]


def test_no_file(path):
    assert list(read_jsonl_rows(path)) == []
    write(path, 5)
    assert steps(path) == []


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from rlinf_lite.observability import JsonlSink

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sink = JsonlSink(Path(sys.argv[1]), committed_step=None)
resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.RLIM_INFINITY))
for step in range(1, 5):
    sink.log(step, {"reward": 0.5})
try:
    sink.sync()
except OSError as error:
    print("not durable:", error.filename == sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
sink.log(5, {"reward": 0.5})
sink.sync()
"""


def test_a_full_disk_loses_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    shown = subprocess.run([sys.executable, "-c", _FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert "rows are kept in memory from step 2 on" in shown.stdout and "not durable: True" in shown.stdout
    assert [row["step"] for row in read_jsonl_rows(path)] == [1, 2, 3, 4, 5]


def test_damaged_lines_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "a\n\xff\n[3]\n{"step": 4}\n{"st')
    assert [row["step"] for row in read_jsonl_rows(path)] == [1, 4]
