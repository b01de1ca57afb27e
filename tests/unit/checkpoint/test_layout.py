"""Names of directories: which are checkpoints, which leftovers are removed, which are kept."""

from pathlib import Path

import pytest

from rlinf_lite.checkpoint import layout

NO_CHECKPOINTS = [
    "global_step_5.tmp-0a1b2c3d",
    "global_step_5.superseded-0a1b2c3d",
    "global_step_",
    "global_step_-5",
    "global_step_05",
    "global_step_5 ",
    "global_step_5.5",
    "global_step_\u0665",
    "Global_step_5",
    "xglobal_step_5",
    "global_step_5\n",
    "latest",
]


@pytest.mark.parametrize("step", [0, 5, 1234567])
def test_a_step_directory_names_its_step(step):
    assert layout.step_of(layout.step_dir(Path("some/where"), step)) == step


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_no_other_name_is_a_checkpoint(root, name):
    (root / name).mkdir(parents=True)
    assert layout.step_of(root / name) is None
    assert layout.committed(root) == []


def test_checkpoints_are_listed_newest_first_by_number(root):
    for step in (9, 100, 10):
        (root / f"global_step_{step}").mkdir(parents=True)
    (root / "global_step_7").write_text("a file")
    assert [path.name for path in layout.committed(root)] == ["global_step_100", "global_step_10", "global_step_9"]


def test_a_directory_that_is_not_there_holds_nothing(root):
    assert layout.committed(root) == []
    assert layout.sweep(root) == []


def test_sweep_removes_leftovers_and_nothing_else(root):
    stage = layout.staging_dir(root, 5)
    (stage / "actor").mkdir(parents=True)
    (stage / "actor" / "__0_0.distcp").write_text("half")
    kept = ["global_step_4", "global_step_4.superseded-00000000", "notes", "global_step_4.tmp-backup"]
    for name in kept:
        (root / name).mkdir()
    assert layout.sweep(root) == [stage]
    assert sorted(path.name for path in root.iterdir()) == sorted(kept)


def test_sweep_does_not_follow_a_link(root, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    root.mkdir()
    (root / "global_step_5.tmp-00000000").symlink_to(precious)
    assert layout.sweep(root) == []
    assert precious.is_dir()


def test_two_stages_of_one_step_never_meet(root):
    assert len({layout.staging_dir(root, 5) for _ in range(100)}) == 100


def test_what_is_set_aside_keeps_its_content(root):
    path = root / "global_step_5"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("content")
    aside = layout.set_aside(path)
    assert not path.exists()
    assert (aside / "manifest.json").read_text() == "content"
    assert layout.committed(root) == []
    assert layout.sweep(root) == []


def test_a_pin_goes_with_what_was_pinned(tmp_path):
    path = layout.step_dir(tmp_path, 5)
    path.mkdir()
    layout.pin_file(path).touch()
    aside = layout.set_aside(path)
    assert layout.is_pinned(aside) and not layout.is_pinned(path)
