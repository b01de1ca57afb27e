"""Where a run writes, and which of these places it holds against a second driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlinf_lite.checkpoint.storage import folder
from rlinf_lite.config import Config, ConfigError
from rlinf_lite.main_math import load
from rlinf_lite.runner.launch import make_folders


def config(tmp_path: Path, root: str | None = None) -> Config:
    made = load([f"runner.output_dir={tmp_path / 'logs'}", "runner.experiment_name=x"])
    made.runner.checkpoint.root = root
    return made


def test_checkpoints_lie_in_the_run_folder(tmp_path):
    folders = make_folders(config(tmp_path))
    assert folders.checkpoints == tmp_path / "logs" / "x" / "checkpoints" and folders.checkpoints.is_dir()
    assert folders.owned == [folders.checkpoints]
    assert list(folders.checkpoints.iterdir()) == []


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_checkpoints_may_lie_in_another_folder(tmp_path, prefix):
    elsewhere = tmp_path / "elsewhere"
    folders = make_folders(config(tmp_path, f"{prefix}{elsewhere}"))
    assert folders.checkpoints == elsewhere and elsewhere.is_dir()
    assert folders.owned == [elsewhere, tmp_path / "logs" / "x"]


def test_checkpoints_may_lie_behind_a_url(tmp_path):
    folders = make_folders(config(tmp_path, "memory://bucket/x"))
    assert folders.checkpoints == folder("memory://bucket/x")
    assert folders.owned == [tmp_path / "logs" / "x"]


@pytest.mark.parametrize(
    ("root", "said"),
    [
        ("nosuch://x", "runner.checkpoint.root=nosuch://x"),
        ("/dev/null/x", "runner.checkpoint.root: cannot write in /dev/null/x"),
    ],
)
def test_a_root_that_cannot_be_used_is_named(tmp_path, root, said):
    with pytest.raises(ConfigError) as caught:
        make_folders(config(tmp_path, root))
    assert said in str(caught.value)
