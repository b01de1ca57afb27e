"""Files and directories that appear whole or not at all, and the fsyncs that make them durable."""

from __future__ import annotations

import os

import pytest
import torch

from rlinf_lite.durable import new_directory, new_file, replace_text, replaced_file


@pytest.fixture
def synced(monkeypatch):
    """The names of files and directories that were fsynced, in order."""
    names, fsync = [], os.fsync

    def record(handle):
        names.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record)
    return names


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "directory"
    path.mkdir()
    return path


@pytest.mark.parametrize("several_writers", [False, True])
def test_a_file_is_replaced_at_once(directory, several_writers):
    path = directory / "x.json"
    replace_text(path, "old")
    with replaced_file(path, several_writers=several_writers) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(directory.iterdir()) == [path]


@pytest.mark.parametrize("several_writers", [False, True])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(directory, several_writers):
    path = directory / "x.json"
    replace_text(path, "old")
    with pytest.raises(KeyError), replaced_file(path, several_writers=several_writers) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == "old"
    assert list(directory.iterdir()) == [path]


def test_a_full_disk_is_named_and_leaves_the_old_file(directory, largest_file):
    path = directory / "x.json"
    replace_text(path, "old")
    with pytest.raises(OSError, match=r"File too large: .*x\.json\.tmp"), largest_file(100):
        replace_text(path, "x" * 1000)
    assert path.read_text() == "old"
    assert list(directory.iterdir()) == [path]


def test_the_error_of_the_disk_is_not_hidden_by_torch(directory, largest_file):
    with (
        pytest.raises(OSError, match=r"File too large: .*w\.pt"),
        largest_file(1000),
        new_file(directory / "w.pt") as file,
    ):
        torch.save(torch.zeros(10_000), file)


def test_two_writers_do_not_share_a_temporary_file(directory):
    path = directory / "page.html"
    with (
        replaced_file(path, several_writers=True) as first,
        replaced_file(path, several_writers=True) as second,
    ):
        first.write(b"first")
        second.write(b"second")
    assert path.read_text() == "first"
    assert list(directory.iterdir()) == [path]


def test_what_a_kill_left_is_overwritten(directory):
    (directory / "x.json.tmp").write_text("half of a file that was longer")
    replace_text(directory / "x.json", "new")
    assert [path.read_text() for path in directory.iterdir()] == ["new"]


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(directory, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (directory / "x.json.tmp").symlink_to(victim)
    with pytest.raises(OSError, match="is a symbolic link"):
        replace_text(directory / "x.json", "new")
    assert victim.read_text() == "precious"


def test_the_file_is_synced_before_its_directory(directory, synced):
    replace_text(directory / "x.json", "new")
    assert synced == ["x.json.tmp", "directory"]


def test_nothing_is_synced_where_that_is_not_asked_for(directory, synced):
    replace_text(directory / "x.json", "new", durable=False)
    assert synced == []
    assert (directory / "x.json").read_text() == "new"


def test_a_directory_appears_when_it_is_full(tmp_path, synced):
    path = tmp_path / "out"
    with new_directory(path) as inside:
        (inside / "x").write_text("x")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["x"]
    assert [name.partition(".")[0] for name in synced] == ["out", tmp_path.name.partition(".")[0]]


def test_a_failed_directory_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), new_directory(tmp_path / "out") as inside:
        (inside / "x").write_text("x")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
