"""Where a run writes, and which of these places it holds against a second driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlinf_lite.checkpoint.storage import storage_path
from rlinf_lite.config import Config, ConfigError
from rlinf_lite.config.compose import load
from rlinf_lite.recovery.directories import make_directories


def config(tmp_path: Path, root: str | None = None) -> Config:
    made = load([f"runner.output_dir={tmp_path / 'logs'}", "runner.experiment_name=x"])
    made.runner.checkpoint.root = root
    return made


def test_checkpoints_lie_in_the_run_directory(tmp_path):
    directories = make_directories(config(tmp_path).runner)
    assert directories.checkpoints == tmp_path / "logs" / "x" / "checkpoints" and directories.checkpoints.is_dir()
    assert directories.owned == [directories.checkpoints]
    assert list(directories.checkpoints.iterdir()) == []


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_checkpoints_may_lie_in_another_directory(tmp_path, prefix):
    elsewhere = tmp_path / "elsewhere"
    directories = make_directories(config(tmp_path, f"{prefix}{elsewhere}").runner)
    assert directories.checkpoints == elsewhere and elsewhere.is_dir()
    assert directories.owned == [elsewhere, tmp_path / "logs" / "x"]


def test_checkpoints_may_lie_behind_a_url(tmp_path):
    directories = make_directories(config(tmp_path, "memory://bucket/x").runner)
    assert directories.checkpoints == storage_path("memory://bucket/x")
    assert directories.owned == [tmp_path / "logs" / "x"]


@pytest.mark.parametrize(
    ("root", "said"),
    [
        ("nosuch://x", "runner.checkpoint.root=nosuch://x"),
        ("/dev/null/x", "runner.checkpoint.root: cannot write in /dev/null/x"),
    ],
)
def test_a_root_that_cannot_be_used_is_named(tmp_path, root, said):
    with pytest.raises(ConfigError) as caught:
        make_directories(config(tmp_path, root).runner)
    assert said in str(caught.value)
