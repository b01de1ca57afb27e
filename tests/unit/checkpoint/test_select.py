"""Which checkpoint a run starts from, and the errors when it cannot be the one that was asked for."""

import pytest

from rlinf_lite.checkpoint import DamagedCheckpoint, NoCheckpoint, WouldStartFresh, layout, select


def damage(path):
    """One byte of the shard is another one; returns the file."""
    shard = path / "actor" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    return shard


def test_null_in_an_empty_directory_is_a_fresh_start(root):
    selection = select(None, root, verify="full")
    assert selection.path is None
    assert selection.manifest is None


def test_null_over_checkpoints_is_refused(save, root):
    save(4)
    save(8)
    with pytest.raises(WouldStartFresh, match=r"global_step_8 and 1 more.*runner\.resume_dir=auto"):
        select(None, root, verify="full")


def test_null_over_a_damaged_checkpoint_is_refused_too(save, root):
    (save(4) / "manifest.json").unlink()
    with pytest.raises(WouldStartFresh, match="global_step_4"):
        select(None, root, verify="full")


def test_null_over_leftovers_alone_is_a_fresh_start(root):
    layout.staging_dir(root, 4).mkdir(parents=True)
    assert select(None, root, verify="full").path is None


def test_a_path_is_taken_wherever_it_lies(save, root, tmp_path):
    path = save(4, seed=3)
    selection = select(str(path), tmp_path / "another run", verify="full")
    assert selection.path == path
    assert selection.manifest.info == {"seed": 3}


def test_a_path_with_a_slash_at_its_end_is_the_same(save, root):
    assert select(f"{save(4)}/", root, verify="full").manifest.step == 4


def test_a_missing_path_names_what_lies_beside_it(save, root):
    save(4)
    save(8)
    with pytest.raises(NoCheckpoint, match=r"global_step_6: no such checkpoint; .* holds global_step_8, global_step_4"):
        select(str(root / "global_step_6"), root, verify="full")


def test_a_missing_path_in_a_missing_directory(root):
    with pytest.raises(NoCheckpoint, match=r"no such checkpoint$"):
        select(str(root / "global_step_6"), root, verify="full")


@pytest.mark.parametrize("name", ["", "global_step_4/actor", "global_step_4.tmp-0a1b2c3d"])
def test_a_path_of_another_name_is_refused(save, root, name):
    path = save(4)
    layout.set_aside(path).rename(root / "global_step_4.tmp-0a1b2c3d")
    save(4)
    with pytest.raises(NoCheckpoint, match="not a global_step_N directory"):
        select(str(root / name), root, verify="full")


def test_a_damaged_path_is_an_error_and_not_stepped_over(save, root):
    save(4)
    path = save(8)
    shard = damage(path)
    with pytest.raises(DamagedCheckpoint, match=str(shard)):
        select(str(path), root, verify="full")


def test_auto_in_an_empty_or_missing_directory_is_a_fresh_start(root):
    assert select("auto", root, verify="full").path is None
    root.mkdir()
    assert select("auto", root, verify="full").path is None


def test_auto_takes_the_newest(save, root):
    save(4)
    newest = save(10)
    save(9)
    selection = select("auto", root, verify="full")
    assert selection.path == newest
    assert selection.skipped == ()


def test_auto_steps_over_damage_and_says_which_and_why(save, root):
    good = save(4)
    torn, flipped = save(8), save(12)
    (torn / "manifest.json").unlink()
    shard = damage(flipped)
    selection = select("auto", root, verify="full")
    assert selection.path == good
    assert len(selection.skipped) == 2
    assert str(shard) in selection.skipped[0]
    assert "blake3" in selection.skipped[0]
    assert str(torn) in selection.skipped[1]
    assert "never committed" in selection.skipped[1]
    assert torn.is_dir()
    assert flipped.is_dir()


def test_auto_sees_with_the_level_it_is_given(save, root):
    save(4)
    damage(save(8))
    assert select("auto", root, verify="size").manifest.step == 8
    assert select("auto", root, verify="full").manifest.step == 4


def test_auto_over_damage_alone_is_an_error_and_no_fresh_start(save, root):
    shards = [damage(save(4)), damage(save(8))]
    with pytest.raises(DamagedCheckpoint, match="none of the 2 checkpoints") as caught:
        select("auto", root, verify="full")
    for shard in shards:
        assert str(shard) in str(caught.value)


def test_auto_passes_by_what_was_superseded_or_left_aside(save, root):
    good = save(4)
    layout.set_aside(save(8))
    save(12).rename(layout.staging_dir(root, 12))
    assert select("auto", root, verify="full").path == good
