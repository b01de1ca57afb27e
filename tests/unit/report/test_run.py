"""Reading the directory of a run: complete, incomplete, and damaged."""

from __future__ import annotations

import shutil

import pytest

from rlinf_lite.observability import EventLog
from rlinf_lite.observability.events import SAVE
from rlinf_lite.report.run import ReportError, read_run


def test_a_complete_run(run):
    found = read_run(run)
    assert found.name == "<run>" and found.last_step == 30 and found.num_torn == 0
    steps, values = found.column("val/accuracy")
    assert steps.tolist() == [5, 10, 15, 20, 25, 30] and values[1] == 0.9
    assert [(event.step, event.kind, event.text[:27]) for event in found.restarts] == [
        (20, "restart", "ActorGroup rank 1 was lost "),
        (20, "resume", "/x/checkpoints/global_step_"),
    ]
    assert [(save.step, save.figures["time/save_stall"]) for save in found.saves] == [(10, 0.02), (20, 0.02)]
    assert found.kept == {10: 2, 20: 2}
    assert [*found.configs] == ["config.yaml", "config.from_step_20.yaml"]
    assert found.settings["runner.hang_timeout"] == 30


@pytest.mark.parametrize("cut", [1, 5, 200])
def test_an_incomplete_last_row_is_left_out_and_counted(run, cut):
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    found = read_run(run)
    assert (found.last_step, found.num_torn) == ((30, 0) if cut == 1 else (29, 1))


def test_nan_and_infinities_are_counted_and_left_out(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss/total": NaN}\n{"step": 32, "loss/total": Infinity}\n')
    found = read_run(run)
    assert found.num_not_finite["loss/total"] == 2 and found.last_step == 32
    assert found.column("loss/total").steps.tolist() == list(range(1, 31))


def test_another_directory_is_refused_with_the_runs_below_it(run, tmp_path):
    with pytest.raises(ReportError, match=f"did you mean {run}"):
        read_run(tmp_path)
    with pytest.raises(ReportError, match="there is no such directory; give that of a run"):
        read_run(tmp_path / "none")
    shutil.rmtree(run)
    with pytest.raises(ReportError, match=r"not the directory of a run .*; give"):
        read_run(tmp_path)


def test_a_save_that_was_repeated_after_a_resume_counts_once(run):
    events = EventLog(run / "events.jsonl", clock=lambda: 1.8e9)
    events.add(SAVE, 20, "", {"time/save_stall": 0.9, "time/save_durable": 1.0})
    events.add(SAVE, 35, "", {"time/save_stall": 0.9, "time/save_durable": 1.0})  # of a step that has no row any more
    assert [(save.step, save.figures["time/save_stall"]) for save in read_run(run).saves] == [(10, 0.02), (20, 0.9)]
