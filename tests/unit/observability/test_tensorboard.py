"""Event files read back by TensorBoard's own reader: each step exactly once, whatever happened in between."""

from __future__ import annotations

import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlinf_lite.config import ConfigError
from rlinf_lite.observability.tensorboard import TensorBoardSink


def scalars(log_dir) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars("reward/mean")]


def log(log_dir, committed_step, *steps, factor=1.0) -> None:
    sink = TensorBoardSink(log_dir, committed_step=committed_step)
    for step in steps:
        sink.log(step, {"reward/mean": step * factor, "optim/lr": 1e-4})
    sink.close()


def test_killed_and_resumed_twice(tmp_path, session):
    log_dir = tmp_path / "run" / "tensorboard"
    session("tensorboard", None, 1, 9, "kill")
    assert [step for step, _ in scalars(log_dir)] == list(range(1, 10)), "a kill takes no row with it"
    newest = max(log_dir.iterdir())
    newest.write_bytes(newest.read_bytes()[:-7])
    log(log_dir, 5, *range(6, 13), factor=1 / 3)
    log(log_dir, 10, *range(11, 16), factor=1 / 3)
    assert [step for step, _ in scalars(log_dir)] == list(range(1, 16))
    assert [value for _, value in scalars(log_dir)] == pytest.approx([step / 3 for step in range(1, 16)])


def test_a_row_is_in_the_file_before_log_returns(tmp_path):
    sink = TensorBoardSink(tmp_path, committed_step=None)
    (path,) = tmp_path.iterdir()
    for step in range(1, 41):
        sink.log(step, {"reward/mean": 0.5})
        assert path.read_bytes().count(b"reward/mean") == step
    sink.close()


def test_restarts_within_a_second_are_read_in_order(tmp_path):
    for committed, factor in ((None, 1.0), (1, 10.0), (3, 100.0)):
        log(tmp_path, committed, *range((committed or 0) + 1, 6), factor=factor)
    assert scalars(tmp_path) == [(1, 1.0), (2, 20.0), (3, 30.0), (4, 400.0), (5, 500.0)]


def test_a_new_run_hides_the_events_of_an_earlier_one(tmp_path):
    log(tmp_path, None, 0, 1, 2, 3)
    log(tmp_path, None, 1, 2, factor=10.0)
    assert scalars(tmp_path) == [(1, 10.0), (2, 20.0)]


def test_a_clock_that_went_back_is_said(tmp_path, capsys):
    (tmp_path / f"events.out.tfevents.{int(time.time()) + 1000}.host.1.0").write_bytes(b"")
    log(tmp_path, 1, 2)
    assert "s behind the newest event file; replayed steps may show twice" in capsys.readouterr().out


def test_a_missing_package_is_a_config_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError) as caught:
        TensorBoardSink(tmp_path, committed_step=None)
    assert str(caught.value) == (
        "runner.logger.logger_backends: tensorboard is not installed; pip install tensorboard, or leave it out"
    )
