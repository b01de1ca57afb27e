"""Event files, read by TensorBoard's own reader, show each step exactly once across kills and resumes."""

from __future__ import annotations

import sys
import time

import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlinf_lite.errors import ConfigError
from rlinf_lite.observability import EventLog, JsonlSink
from rlinf_lite.observability.events import RECOVERED, RESTART, RESUME
from rlinf_lite.observability.tensorboard import TensorBoardSink


def scalars(log_dir) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars("reward/mean")]


def texts(log_dir, tag) -> list[tuple[int, str]]:
    # The reader of the text tab; the other one keeps texts of purged steps.
    accumulator = plugin_event_accumulator.EventAccumulator(str(log_dir), size_guidance={"tensors": 0})
    accumulator.Reload()
    if f"{tag}/text_summary" not in accumulator.Tags()["tensors"]:
        return []
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in accumulator.Tensors(f"{tag}/text_summary")]


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


def test_a_clock_that_was_set_back_is_logged(tmp_path, capsys):
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


def test_tables_of_responses_appear_once_after_kills(tmp_path):
    log_dir = tmp_path / "tensorboard"
    for committed, steps in ((None, range(1, 23)), (15, range(16, 32))):
        rollouts = JsonlSink(tmp_path / "rollouts.jsonl", committed_step=committed)
        for step in steps:
            row = {"prompt_id": step, "sample": 0, "prompt_ids": [1], "prompt": "1+1=", "text": "a|b", "reward": 1.0}
            rollouts.log_rows(step, [row])
        log(log_dir, committed, *steps)
        rollouts.close()
    shown = texts(log_dir, "samples/rollouts")
    assert [step for step, _ in shown] == [1, 10, 20, 30]
    assert shown[-1][1].splitlines()[2] == "| 30 | 30 | 0 | 1&#43;1&#61; | a&#124;b | 1&#46;0 |"


def test_restarts_are_counted_and_described_at_the_next_step(tmp_path):
    events, log_dir = EventLog(tmp_path / "events.jsonl"), tmp_path / "tensorboard"
    sink = TensorBoardSink(log_dir, committed_step=None)
    for step in range(1, 7):
        sink.log(step, {"reward/mean": 0.5})
        if step == 3:
            events.add(RESTART, 3, "a *worker* was lost")
            events.add(RECOVERED, 4, "in 1 s")
    sink.close()
    events.add(RESUME, 5, "from 5")
    log(log_dir, 5, 6, 7)
    accumulator = EventAccumulator(str(log_dir))
    accumulator.Reload()
    assert [(e.step, e.value) for e in accumulator.Scalars("events/restarts")] == [(4, 1.0), (5, 1.0), (6, 2.0)]
    descriptions = texts(log_dir, "events/what")
    assert descriptions[0] == (4, "**restart** after step 3: a &#42;worker&#42; was lost")
    assert [step for step, _ in descriptions] == [4, 5, 6]
