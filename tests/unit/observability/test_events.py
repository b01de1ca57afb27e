"""Events on disk: appended, damaged, on a full disk; and each restart shown once."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest

from rlinf_lite.observability import EventLog, read_events
from rlinf_lite.observability.events import BACK, RECOVERED, RESTART, RESUME, SAVE, START, History, num_restarts


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


def added(path, *kinds_and_steps, time=0.0) -> None:
    log = EventLog(path, clock=lambda: time)
    for kind, step in kinds_and_steps:
        log.add(kind, step)


def test_an_event_is_written_at_once_and_reads_back(path):
    log = EventLog(path, clock=lambda: 12.5)
    log.add(SAVE, 7, 'said "ü"\nthen died', {"time/save_stall": 0.1 + 0.2})
    (event,) = read_events(path)
    assert (event.kind, event.step, event.time, event.text) == (SAVE, 7, 12.5, 'said "ü"\nthen died')
    assert event.figures == {"time/save_stall": 0.1 + 0.2}
    assert path.read_bytes().count(b"\n") == 1


def test_no_file(path):
    assert read_events(path) == []


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_damaged_line_is_left_out(path, cut):
    added(path, (START, 0), (RESTART, 3))
    path.write_bytes(path.read_bytes()[:-cut])
    added(path, (RESUME, 2))
    kinds = [event.kind for event in read_events(path)]
    assert kinds == ([START, RESTART, RESUME] if cut == 1 else [START, RESUME])


@pytest.mark.parametrize(
    "line",
    [
        b"[1]",
        b"{}",
        b'{"step": 1}',
        b"\xff",
        b'{"kind": "x", "step": 1, "time": 0, "more": 1}',
        b'{"kind": "x", "step": "1", "time": 0}',
        b'{"kind": "x", "step": 1, "time": 0, "figures": {"a": "b"}}',
    ],
)
def test_lines_that_are_not_events_are_left_out(path, line):
    added(path, (START, 0))
    with path.open("ab") as file:
        file.write(line + b"\n")
    assert [event.kind for event in read_events(path)] == [START]


def test_a_new_run_in_the_same_directory_starts_a_new_history(path):
    added(path, (START, 0), (RESTART, 5), (START, 0), (SAVE, 2))
    assert [(event.kind, event.step) for event in read_events(path)] == [(START, 0), (SAVE, 2)]


def test_repeated_steps_do_not_change_the_history(path):
    added(path, (START, 0), (RESTART, 8), (BACK, 5), (RECOVERED, 6), (RESUME, 5))
    assert [event.step for event in read_events(path)] == [0, 8, 5, 6, 5]
    assert num_restarts(read_events(path)) == 2


@pytest.fixture
def no_file_can_grow():
    """The kernel refuses every write to a file, as a full disk does."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_logged_once_and_does_not_end_the_run(path, capsys, no_file_can_grow):
    log = EventLog(path)
    log.add(RESTART, 1)
    log.add(RESTART, 2)
    assert capsys.readouterr().out.count("File too large; the run continues") == 1


def test_a_device_is_not_written_to(capsys):
    EventLog(Path("/dev/full")).add(RESTART, 1)
    assert "/dev/full: is no ordinary file, and is not written to" in capsys.readouterr().out


def test_a_missing_directory_does_not_end_the_run(tmp_path, capsys):
    EventLog(tmp_path / "gone" / "events.jsonl").add(RESTART, 1)
    assert "the run continues without a record" in capsys.readouterr().out


def test_each_restart_is_shown_once_with_the_next_row(path):
    history = History(path, committed_step=None)
    assert history.new(1) == []
    added(path, (START, 0), (SAVE, 2), (RESTART, 3), (RECOVERED, 4))
    assert history.new(3) == []
    assert [event.kind for event in history.new(4)] == [RESTART]
    assert [event.kind for event in history.new(5)] == [RECOVERED]
    assert history.new(6) == []
    added(path, (RESTART, 6))
    assert [event.step for event in history.new(7)] == [6]
    assert (history.num_restarts(4), history.num_restarts(7)) == (1, 2)


def test_a_resume_shows_later_restarts_again(path):
    added(path, (START, 0), (RESTART, 3), (RESTART, 8), (RESUME, 5))
    history = History(path, committed_step=5)
    assert [(event.kind, event.step) for event in history.new(6)] == [(RESUME, 5)]
    assert [(event.kind, event.step) for event in history.new(9)] == [(RESTART, 8)]
    assert history.num_restarts(6) == 2


def test_an_unchanged_file_is_not_read_again(path):
    added(path, (RESTART, 1))
    history = History(path, committed_step=None)
    assert len(history.new(2)) == 1
    content = path.read_bytes()
    path.write_bytes(b"x" * len(content))
    os.utime(path)
    assert history.new(3) == []
