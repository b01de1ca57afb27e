"""Aligned step lines, and a progress bar on terminals only."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import termios

import pytest

from rlinf_lite.observability import log_line
from rlinf_lite.observability.console import ConsoleSink
from rlinf_lite.observability.step_line import COLUMNS, step_line

FULL = {
    "reward/mean": 0.412,
    "loss/policy": -0.0131,
    "length/response_mean": 3.4,
    "policy/kl": 0.0,
    "policy/clip_fraction": 0.0,
    "optim/grad_norm": 0.41,
    "optim/lr": 1.9e-4,
    "time/sync": 0.01,
    "time/rollout": 0.08,
    "time/step": 0.21,
    "throughput/tokens_per_second": 5234.0,
}


def test_the_whole_line():
    assert step_line(12, FULL, 60) == (
        "step   12/60  reward  0.412  loss  -0.0131  len    3.4  kl  0.000  clip   0.0%  gnorm   0.41  lr 1.9e-04"
        " | sync  0.01 rollout  0.08 s |  5.2k tok/s"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"reward/mean": -0.5, "loss/policy": 0.3, "policy/clip_fraction": 1.0},
        {"reward/mean": 1234567.0, "loss/policy": -98765.4321, "policy/kl": -1e30},
        {"length/response_mean": 8192.0, "optim/grad_norm": 1e9, "optim/lr": 0.0},
        {"reward/mean": float("nan"), "loss/policy": float("-inf"), "optim/grad_norm": float("inf")},
        {"time/sync": 12345.678, "throughput/tokens_per_second": 31.0, "val/accuracy": 0.9},
        {"time/rollout": 59.99, "throughput/tokens_per_second": 123456789.0},
    ],
)
def test_labels_and_borders_are_aligned(changes):
    border = re.compile(r"step|reward|loss|len|kl|clip|gnorm|lr|sync|rollout| s |\||tok/s")

    def places(line: str) -> list[tuple[int, str]]:
        return [(match.start(), match.group()) for match in border.finditer(line)]

    usual = places(step_line(7, FULL, 60))
    assert places(step_line(60, FULL | changes, 60))[: len(usual)] == usual


def test_missing_metrics_are_left_out():
    assert step_line(3, {}) == "step    3"
    assert step_line(3, {"time/step": 1.0, "reward/mean": 0.5, "memory/driver_gb": 1.0}, 12345) == (
        "step     3/12345  reward  0.500"
    )
    assert step_line(3, {"val/accuracy": 0.912}) == "step    3 | val 0.912"


def test_every_column_can_be_shown():
    line = step_line(1, {column.key: 0.5 for column in COLUMNS})
    assert all(f" {column.label} " in line for column in COLUMNS)


def test_no_bar_without_a_terminal(capsys):
    sink = ConsoleSink(num_steps=3, committed_step=None)
    sink.log(1, FULL)
    log_line("notice")
    sink.close()
    sink.close()
    captured = capsys.readouterr()
    assert captured.out == f"{step_line(1, FULL, 3)}\nnotice\n"
    assert captured.err == ""


def test_on_a_terminal_the_bar_moves_and_lines_stay_intact(environment):
    code = (
        "from rlinf_lite.observability.console import ConsoleSink; from rlinf_lite.observability import log_line\n"
        "sink = ConsoleSink(num_steps=8, committed_step=4)\n"
        "for step in range(5, 9): sink.log(step, {'reward/mean': 0.5})\n"
        "log_line('all done'); sink.close()\n"
    )
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:  # how Linux reports that the other end of a pseudo-terminal is closed
        pass
    assert process.wait() == 0
    text = shown.decode()
    assert "4/8" in text and "8/8" in text
    lines = [re.split(r"\r", line)[-1] for line in text.replace("\r\n", "\n").split("\n")]
    for expected in [*(f"step    {step}/8  reward  0.500" for step in range(5, 9)), "all done"]:
        assert lines.count(expected) == 1, text


def test_a_long_phase_is_shown_with_fewer_decimals():
    line = step_line(1, {"time/update": 154.32, "time/rollout": 98765.0, "time/sync": 1e7})
    assert "update 154.3" in line and "rollout 98765" in line and "sync 1e+07" in line
