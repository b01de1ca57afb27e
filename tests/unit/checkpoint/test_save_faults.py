"""A save that fails or is killed in any phase: nothing incomplete is accepted, nothing older is lost."""

import errno
import json
import os
import subprocess

import pytest
import torch

from rlinf_lite.checkpoint import Checkpointer, SaveError, flatten, layout, select

PHASES = ["save.write", "save.data", "save.manifest", "save.rename", "save.committed"]

SAVE_STEP_8 = """
    import os, pathlib, torch
    os.environ["RLINF_LITE_FAULTS"] = table
    from rlinf_lite.checkpoint import Checkpointer
    state = {"model": {"layer.weight": torch.full((16, 8), 8.0)}}
    Checkpointer(pathlib.Path(root), seed=7).save(8, state, data={}, info={})
"""


def content_of(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def names_in(root):
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def save_fails(root, make_state):
    def save(step):
        with pytest.raises(SaveError) as caught:
            Checkpointer(root, seed=7).save(step, make_state(step), data={}, info={})
        return str(caught.value)

    return save


@pytest.mark.parametrize("action", ["ENOSPC", "EIO", "EACCES"])
@pytest.mark.parametrize("phase", PHASES)
def test_an_error_at_any_phase_leaves_what_was_there(save, save_fails, root, set_faults, phase, action):
    older = save(4)
    before = content_of(older)
    set_faults({"phase": phase, "step": 8, "action": action})
    message = save_fails(8)
    assert str(layout.step_dir(root, 8)) in message
    assert os.strerror(getattr(errno, action)) in message
    assert "on rank 0" in message
    assert names_in(root) == ["global_step_4"]
    assert content_of(older) == before
    assert select("auto", root, verify="full").path == older
    set_faults()
    assert select("auto", root, verify="full").path == older
    assert select(str(save(8)), root, verify="full").manifest.step == 8


@pytest.mark.parametrize("phase", PHASES)
def test_an_error_while_replacing_a_step_gives_it_its_name_back(save, save_fails, root, set_faults, phase):
    before = content_of(save(4))
    set_faults({"phase": phase, "action": "ENOSPC"})
    save_fails(4)
    assert names_in(root) == ["global_step_4"]
    assert content_of(root / "global_step_4") == before


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_at_any_phase_leaves_no_incomplete_checkpoint(save, root, run_script, make_state, phase):
    older = save(4)
    before = content_of(older)
    table = json.dumps([{"phase": phase, "step": 8, "action": "kill"}])
    assert run_script(SAVE_STEP_8, root=str(root), table=table) == -9
    expected = 8 if phase == "save.committed" else 4
    assert select("auto", root, verify="full").manifest.step == expected
    assert len(layout.sweep(root)) == (phase != "save.committed")
    assert content_of(older) == before
    state = make_state(0)
    Checkpointer(root, seed=7).load(save(8), state)
    assert all(torch.equal(tensor, flatten(make_state(8))[name]) for name, tensor in flatten(state).items())
    assert select("auto", root, verify="full").manifest.step == 8


def test_a_kill_in_the_middle_of_replacing_a_step_loses_no_byte(save, root, run_script):
    older, before = save(4), content_of(save(8))
    table = json.dumps([{"phase": "save.rename", "action": "kill"}])
    assert run_script(SAVE_STEP_8, root=str(root), table=table) == -9
    layout.sweep(root)
    assert select("auto", root, verify="full").path == older
    (aside,) = (path for path in root.iterdir() if ".superseded-" in path.name)
    assert content_of(aside) == before


def test_an_unwritable_place_is_named(root, save_fails):
    root.write_text("a file where the directory should be")
    message = save_fails(4)
    assert str(root) in message
    assert "on rank 0" in message


LARGE_SAVE = """
    import pathlib, resource, sys, torch
    from rlinf_lite.checkpoint import Checkpointer, SaveError, select
    checkpointer = Checkpointer(pathlib.Path(root), seed=7)
    state = {"model": {f"layer.{i}": torch.ones(100_000) for i in range(8)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        checkpointer.save(8, state, data={}, info={})
    except SaveError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        pathlib.Path(said).write_text(str(error))
        sys.exit(3)
"""


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("cannot mount a file system here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_disk_that_is_really_full(small_disk, run_script, tmp_path, make_state):
    root, said = small_disk / "checkpoints", tmp_path / "said"
    older = Checkpointer(root, seed=7).save(4, make_state(4), data={}, info={}).path
    assert run_script(LARGE_SAVE, root=str(root), said=str(said), limit=0) == 3
    assert "No space left on device" in said.read_text()
    assert "__0_0.distcp" in said.read_text()
    assert names_in(root) == ["global_step_4"]
    assert select("auto", root, verify="full").path == older
    Checkpointer(root, seed=7).save(8, make_state(8), data={}, info={})
    assert select("auto", root, verify="full").manifest.step == 8


@pytest.mark.parametrize("limit", [1, 5000, 150_000, 3_000_000])
def test_a_file_that_may_not_grow(save, root, run_script, tmp_path, limit):
    older, said = save(4), tmp_path / "said"
    assert run_script(LARGE_SAVE, root=str(root), said=str(said), limit=limit) == 3
    assert os.strerror(errno.EFBIG) in said.read_text()
    assert "__0_0.distcp" in said.read_text()
    assert names_in(root) == ["global_step_4"]
    assert select("auto", root, verify="full").path == older
