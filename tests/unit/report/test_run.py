"""Reading the directory of a run: complete, incomplete, damaged, and of older versions."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from rlinf_lite.observability import EventLog
from rlinf_lite.observability.events import BACK, RESUME, SAVE
from rlinf_lite.report.run import ReportError, read_run


def test_a_complete_run(run):
    found = read_run(run)
    assert found.name == "<run>" and found.last_step == 30 and found.num_torn == 0
    steps, values = found.column("val/accuracy")
    assert steps.tolist() == [5, 10, 15, 20, 25, 30] and values[1] == 0.9
    assert [(mark.step, mark.text[:27]) for mark in found.restarts] == [
        (20, "ActorGroup rank 1 was lost "),
        (20, "resumed from global_step_20"),
    ]
    assert [(save.step, save.stall_seconds) for save in found.saves] == [(10, 0.02), (20, 0.02)]
    assert found.kept == {10: 2, 20: 2}
    assert found.start_time == 1.7e9
    assert [config.name for config in found.configs] == ["config.yaml", "config.from_step_20.yaml"]
    assert found.setting("runner.hang_timeout") == 30


@pytest.mark.parametrize("cut", [1, 5, 200])
def test_an_incomplete_last_row_is_left_out_and_counted(run, cut):
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    found = read_run(run)
    assert (found.last_step, found.num_torn) == ((30, 0) if cut == 1 else (29, 1))


def test_nan_and_infinities_are_kept(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss/total": NaN}\n{"step": 32, "loss/total": Infinity}\n')
    values = read_run(run).column("loss/total")[1]
    assert np.isnan(values[-2]) and np.isinf(values[-1])


def test_restarts_of_runs_without_events_come_from_config_files(run):
    (run / "events.jsonl").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "time/save_stall": 0.25, "time/save_durable": 1.5, "save/num_bytes": 3}\n')
    found = read_run(run)
    assert [mark.step for mark in found.restarts] == [20]
    assert [(save.step, save.stall_seconds, save.num_bytes) for save in found.saves] == [(31, 0.25, 3.0)]
    assert found.start_time == (run / "config.yaml").stat().st_mtime


def test_another_directory_is_refused_with_the_runs_below_it(run, tmp_path):
    with pytest.raises(ReportError, match=f"did you mean {run}"):
        read_run(tmp_path)
    with pytest.raises(ReportError, match="there is no such directory; give that of a run"):
        read_run(tmp_path / "none")
    shutil.rmtree(run)
    with pytest.raises(ReportError, match=r"not the directory of a run .*; give"):
        read_run(tmp_path)


def test_saves_of_steps_that_were_rolled_back_are_not_counted(run):
    events = EventLog(run / "events.jsonl", clock=lambda: 1.8e9)

    def saved(step: int, stall: float) -> None:
        events.add(SAVE, step, "", {"time/save_stall": stall, "time/save_durable": 1.0})

    events.add(RESUME, 10, "checkpoints/global_step_10")
    saved(15, 0.5)
    saved(25, 0.5)
    events.add(BACK, 15)
    saved(20, 0.7)
    saved(20, 0.9)
    shown = [(save.step, save.stall_seconds) for save in read_run(run).saves]
    assert shown == [(10, 0.02), (15, 0.5), (20, 0.9)]
