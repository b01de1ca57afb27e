"""Checkpoints behind an fsspec URL, where nothing can be renamed and the manifest is the commit marker.

``memory://`` is an object store; ``local://`` is one that other processes see too, and that survives a kill.
"""

import uuid

import fsspec
import pytest
import torch

from rlinf_lite import rng
from rlinf_lite.checkpoint import (
    Checkpointer,
    DamagedCheckpoint,
    NoCheckpoint,
    Retention,
    SaveError,
    UnsafeCheckpoint,
    WouldStartFresh,
    flatten,
    layout,
    read_data,
    select,
)
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.formats.read_state import read_tensors
from rlinf_lite.checkpoint.storage import is_local, storage_path

FILES = ["actor/.metadata", "actor/__0_0.distcp", "data/data.pt", "manifest.json"]


@pytest.fixture(params=["memory", "local"])
def url(request, tmp_path):
    if request.param == "local":
        yield f"local://{tmp_path}/checkpoints"
        return
    name = f"/{uuid.uuid4().hex}"
    yield f"memory:/{name}/checkpoints"
    memory = fsspec.filesystem("memory")
    if memory.exists(name):
        memory.rm(name, recursive=True)


@pytest.fixture
def root(url):
    root = storage_path(url)
    assert not is_local(root)
    return root


@pytest.fixture
def load(url, make_state):
    """What a load brings, given names and values."""

    def load_path(path, verify="full"):
        state = make_state(0)
        Checkpointer(url, seed=7).load(path, state, verify=verify)
        return flatten(state)

    return load_path


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def names(root):
    return sorted(path.name for path in root.iterdir())


def content(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_checkpoint_comes_back(url, root, save, load, make_state):
    path = save(4, identity={"seed": 1})
    assert sorted(content(path)) == FILES
    assert equal(load(path), flatten(make_state(4)))
    assert equal(load(f"{url}/global_step_4"), flatten(make_state(4)))
    assert equal(
        read_tensors(path / "actor", lambda name: name.startswith("model.")), flatten({"model": make_state(4)["model"]})
    )
    for asked in ("auto", str(path), f"{url}/global_step_4"):
        chosen = select(asked, root, verify="full")
        assert (chosen.manifest.step, chosen.data) == (4, {"progress": {"step": 4}})
    with pytest.raises(WouldStartFresh, match="global_step_4"):
        select(None, root, verify="full")


def test_the_files_are_those_that_a_local_save_writes(root, save, tmp_path, make_state):
    rng.reseed(7, 0, 0)
    there = content(save(4))
    rng.reseed(7, 0, 0)
    here = content(Checkpointer(tmp_path / "here", seed=7).save(4, make_state(4), data={"progress": {"step": 4}}).path)
    assert there.keys() == here.keys()
    assert all(there[name] == here[name] for name in ("actor/__0_0.distcp", "data/data.pt"))


@pytest.mark.parametrize("name", FILES)
def test_what_has_no_manifest_is_no_checkpoint(root, save, load, name):
    """A torn write: whatever is missing, the manifest is written after it."""
    old, torn = save(4), save(8)
    (torn / "manifest.json").unlink()
    (torn / name).unlink(missing_ok=True)
    assert layout.committed(root) == [old]
    assert select("auto", root, verify="full").path == old
    for verify in manifests.LEVELS:
        with pytest.raises(NoCheckpoint, match="never committed"):
            load(torn, verify)
    assert layout.leftovers(root) == [torn]
    assert layout.sweep(root) == [torn]
    assert names(root) == ["global_step_4"]


def test_an_incomplete_checkpoint_is_replaced_by_the_next_save(root, save, load, make_state):
    incomplete = save(4)
    (incomplete / "manifest.json").unlink()
    (incomplete / "actor" / "__1_0.distcp").write_bytes(b"of another world size")
    path = save(4)
    assert path == incomplete
    assert sorted(content(path)) == FILES
    assert equal(load(path), flatten(make_state(4)))
    assert names(root) == ["global_step_4"]


def test_saving_a_committed_step_again_sets_the_old_one_aside(url, root, save, make_state, load):
    before = content(save(4))
    report = Checkpointer(url, seed=7).save(4, make_state(5), data={"progress": {"step": 4}})
    assert report.superseded.name.startswith("global_step_4.superseded-")
    assert content(report.superseded) == before
    manifests.read_verified(report.superseded, "full")
    assert equal(load(report.superseded), flatten(make_state(4)))
    assert equal(load(report.path), flatten(make_state(5)))
    assert layout.committed(root) == [report.path]
    assert layout.leftovers(root) == []


@pytest.mark.parametrize(
    "phase", ["save.plan", "save.write", "save.halfway", "save.written", "save.data", "save.manifest"]
)
def test_a_save_that_fails_leaves_nothing(root, save, set_faults, phase):
    old = save(4)
    before = content(old)
    set_faults({"phase": phase, "step": 8, "action": "ENOSPC"})
    with pytest.raises(SaveError, match="global_step_8 was not saved: No space left"):
        save(8)
    assert names(root) == ["global_step_4"]
    assert content(old) == before
    set_faults()
    assert select("auto", root, verify="full").path == old
    assert select("auto", root, verify="full").path != save(8) == select("auto", root, verify="full").path


def test_a_failed_save_of_a_committed_step_gives_the_old_content_its_name_back(root, save, set_faults):
    before = content(save(4))
    set_faults({"phase": "save.manifest", "step": 4, "action": "EIO"})
    with pytest.raises(SaveError):
        save(4)
    (aside,) = root.iterdir()
    assert aside.name == "global_step_4"
    assert content(aside) == before


def damages():
    def flip(file):
        changed = bytearray(file.read_bytes())
        changed[len(changed) // 2] ^= 1
        file.write_bytes(bytes(changed))

    yield from ((flip, name, "full") for name in FILES)
    for level in ("full", "size"):
        yield from ((lambda file: file.write_bytes(file.read_bytes()[:-1]), name, level) for name in FILES)
        yield from ((lambda file: file.write_bytes(b""), name, level) for name in FILES)
        yield from ((lambda file: file.unlink(), name, level) for name in FILES[:-1])
        yield from ((lambda file: (file.parent / "more").write_bytes(b"x"), name, level) for name in FILES)


@pytest.mark.parametrize("damage, name, level", list(damages()))
def test_damage_is_noticed_and_stepped_over(root, save, load, damage, name, level):
    old, newest = save(4), save(8)
    damage(newest / name)
    chosen = select("auto", root, verify=level)
    assert chosen.path == old
    assert len(chosen.skipped) == 1
    assert str(newest) in chosen.skipped[0]
    with pytest.raises(DamagedCheckpoint, match="global_step_8"):
        load(newest, level)


def test_retention_deletes_the_manifest_first_and_all_of_it(url, root, make_state):
    checkpointer = Checkpointer(url, seed=7, keep=Retention(keep_last=2))
    reports = [checkpointer.save(step, make_state(step), data={}) for step in (1, 2, 3, 4)]
    assert [[path.name for path in report.removed] for report in reports] == [
        [], [], ["global_step_1"], ["global_step_2"],
    ]  # fmt: skip
    assert names(root) == ["global_step_3", "global_step_4"]


def test_a_pinned_one_stays(url, root, make_state):
    checkpointer = Checkpointer(url, seed=7, keep=Retention(keep_last=1))
    layout.pin_file(checkpointer.save(1, make_state(1)).path).write_bytes(b"")
    for step in (2, 3):
        checkpointer.save(step, make_state(step))
    assert [layout.step_of(path) for path in layout.committed(root)] == [3, 1]


def test_an_async_save_holds_the_state_of_its_instant(url, make_state, load):
    checkpointer = Checkpointer(url, seed=7)
    state = make_state(4)
    checkpointer.start(4, state)
    checkpointer.fence()
    for tensor in flatten(state).values():
        tensor.zero_()
    assert equal(load(checkpointer.finish().path), flatten(make_state(4)))


def test_hostile_files_are_refused_there_too(root, save, load, rewrite_manifest):
    path = save(4)
    (path / "actor" / ".metadata").write_bytes(b"cos\nsystem\n.")
    (path / "data" / "data.pt").write_bytes(b"cos\nsystem\n.")
    with pytest.raises(UnsafeCheckpoint, match=r"os\.system"):
        read_tensors(path / "actor")
    with pytest.raises(DamagedCheckpoint, match=r"data\.pt"):
        read_data(path)
    rewrite_manifest(path, files={"../x": next(iter(manifests.read(path).files.values()))})
    with pytest.raises(UnsafeCheckpoint, match=r"names '\.\./x'"):
        load(path, "off")


def test_an_unknown_scheme_is_named():
    with pytest.raises(ValueError, match="nosuch://x"):
        Checkpointer("nosuch://x")


# -- across processes, where a kill can strike

SAVE = """
import json, os
import torch
os.environ["RLINF_LITE_FAULTS"] = json.dumps(FAULTS)
from rlinf_lite.checkpoint import Checkpointer
for step in STEPS:
    Checkpointer(URL, seed=7).save(step, {"w": torch.full((3,), float(step))}, data={"step": step})
"""


@pytest.fixture
def shared(tmp_path):
    return storage_path(f"local://{tmp_path}/checkpoints")


def value(path):
    state = {"w": torch.zeros(3)}
    Checkpointer(path.parent, seed=7).load(path, state)
    return state["w"].tolist()


@pytest.mark.parametrize("phase", ["save.write", "save.halfway", "save.written", "save.data", "save.manifest"])
def test_a_kill_leaves_no_checkpoint_and_the_next_save_takes_its_place(shared, run_script, phase):
    kill = [{"phase": phase, "step": 8, "action": "kill"}]
    assert run_script(SAVE, URL=str(shared), STEPS=[4, 8], FAULTS=kill) == -9
    assert select("auto", shared, verify="full").path == shared / "global_step_4"
    assert layout.leftovers(shared) == [shared / "global_step_8"], "there was something to tear"
    assert run_script(SAVE, URL=str(shared), STEPS=[8], FAULTS=[]) == 0
    chosen = select("auto", shared, verify="full")
    assert (chosen.path, chosen.data) == (shared / "global_step_8", {"step": 8})
    assert value(chosen.path) == [8.0] * 3
    assert layout.leftovers(shared) == []


def test_a_kill_while_a_committed_step_is_saved_again_loses_nothing(shared, run_script):
    kill = [{"phase": "save.manifest", "step": 8, "action": "kill"}]
    assert run_script(SAVE, URL=str(shared), STEPS=[4, 8], FAULTS=[]) == 0
    assert run_script(SAVE, URL=str(shared), STEPS=[8], FAULTS=kill) == -9
    assert select("auto", shared, verify="full").path == shared / "global_step_4"
    (aside,) = [path for path in shared.iterdir() if ".superseded-" in path.name]
    manifests.read_verified(aside, "full")
    assert value(aside) == [8.0] * 3
    assert layout.sweep(shared) == [shared / "global_step_8"]
    assert aside.is_dir()
