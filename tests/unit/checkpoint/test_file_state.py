"""Sections of files in the state's own layout: one rank, the fence, refusals, and the command line."""

import json
import random

import pytest
import torch

from rlinf_lite.checkpoint import (
    Checkpointer,
    Copied,
    DamagedCheckpoint,
    SaveError,
    SectionMismatch,
    layout,
    manifest,
    select,
)
from rlinf_lite.checkpoint.cli.command import main
from rlinf_lite.checkpoint.parts import FilesPart

MODEL, OPTIMIZER = "mp_rank_00/model_optim_rng.pt", "mp_rank_00/distrib_optim.pt"
TRACKER = "latest_checkpointed_iteration.txt"


class Files:
    """A `FileState` of two files and a tracker."""

    def __init__(self, value=0.0, size=5000):
        self.weight, self.flat = torch.full((size,), value), torch.full((3 * size,), value + 0.5)

    def files(self, step):
        held = {"args": {"layers": 2}, "model": {"w": self.weight}, "rng": random.getstate(), "step": step}
        optimizer = {0: {(torch.float32, torch.float32): {"param": self.flat}}}
        return {
            f"iter_{step:07d}/{MODEL}": held,
            f"iter_{step:07d}/{OPTIMIZER}": optimizer,
            TRACKER: str(step).encode(),
        }

    def load(self, names, read, *, weights_only):
        step = f"iter_{int(read(TRACKER)):07d}"
        held = read(f"{step}/{MODEL}")
        self.weight.copy_(held["model"]["w"])
        if weights_only:
            return False
        self.flat.copy_(read(f"{step}/{OPTIMIZER}")[0][torch.float32, torch.float32]["param"])
        random.setstate(held["rng"])
        return True


@pytest.fixture
def saved(root):
    return Checkpointer(root, seed=7).save(5, Files(2.0), info={"run": "x"}).path


def test_everything_comes_back(saved, root):
    names = [f"actor/iter_0000005/{MODEL}", f"actor/iter_0000005/{OPTIMIZER}", f"actor/{TRACKER}", "data/data.pt"]
    assert sorted(manifest.read(saved).files) == sorted(names)
    drawn, state = random.random(), Files()
    report = Checkpointer(root, seed=7).load(saved, state)
    assert report.rng_restored and random.random() == drawn
    assert report.num_bytes == sum(record.size for record in list(manifest.read(saved).files.values())) - len(
        (saved / "data/data.pt").read_bytes()
    )
    assert torch.equal(state.weight, torch.full((5000,), 2.0)) and torch.equal(state.flat, torch.full((15000,), 2.5))


@pytest.mark.parametrize("staged_fraction", [0.0, 1.0])
def test_the_fence_keeps_the_step_that_was_saved(root, staged_fraction):
    state = Files(3.0, size=3_000_000)
    checkpointer = Checkpointer(root, staged_fraction=staged_fraction)
    checkpointer.start(6, state)
    checkpointer.fence()
    state.weight.fill_(-1), state.flat.fill_(-1)
    path = checkpointer.finish().path
    again = Files(size=3_000_000)
    Checkpointer(root).load(path, again)
    assert again.weight.eq(3.0).all() and again.flat.eq(3.5).all()


def test_the_fence_waits_for_live_tensors_only():
    live, small = torch.ones(5000), torch.ones(3)
    part = FilesPart({"a.pt": {"live": live, "small": small, "copied": Copied(torch.ones(5000))}})
    assert part.num_bytes() == [live.nbytes] and part.tensor(0) is live


def test_an_error_while_writing_leaves_nothing(root, saved, set_faults):
    for phase in ("save.halfway", "save.written", "save.manifest"):
        set_faults({"phase": phase, "step": 8, "action": "ENOSPC"})
        with pytest.raises(SaveError, match="No space left"):
            Checkpointer(root).save(8, Files())
    assert [path.name for path in root.iterdir()] == ["global_step_5"]


@pytest.mark.parametrize("name", ["../x.pt", "/x.pt", "a//b.pt", "", ".metadata", "__0_0.distcp"])
def test_names_that_lead_elsewhere_are_refused(root, name):
    class Elsewhere(Files):
        def files(self, step):
            return {name: b"x"}

    with pytest.raises(ValueError, match="file "):
        Checkpointer(root).save(1, Elsewhere())
    assert layout.committed(root) == []


def test_what_cannot_be_saved_is_named(root):
    class Bad(Files):
        def files(self, step):
            return {"a.pt": {"f": lambda: 0}}

    with pytest.raises(TypeError, match=r"a\.pt cannot be saved"):
        Checkpointer(root).save(1, Bad())


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER])
def test_damage_is_found_and_stepped_over(root, saved, file):
    newer = Checkpointer(root).save(9, Files(4.0)).path
    target = newer / "actor/iter_0000009" / file
    content = bytearray(target.read_bytes())
    content[-700] ^= 4
    target.write_bytes(content)
    state = Files(1.0)
    with pytest.raises(DamagedCheckpoint, match="blake3"):
        Checkpointer(root).load(newer, state)
    assert state.weight.eq(1.0).all(), "the hashes come first"
    assert select("auto", root, verify="full").path == saved
    target.unlink()
    with pytest.raises(DamagedCheckpoint, match="is missing"):
        Checkpointer(root).load(newer, state)


def test_the_other_layout_is_refused_with_the_converter(root, saved, make_state):
    shards = Checkpointer(root).save(7, make_state(7)).path
    with pytest.raises(SectionMismatch, match=r"convert_dcp_to_megatron\.py --dcp_path .*global_step_7 --output_path"):
        Checkpointer(root).load(shards, Files())
    with pytest.raises(SectionMismatch, match=r"convert_megatron_to_dcp\.py --megatron_path .*global_step_5"):
        Checkpointer(root).load(saved, make_state(7))
    with pytest.raises(SectionMismatch, match="convert_megatron_to_dcp"):
        Checkpointer(root).load(saved, {"model": make_state(7)["model"]}, whole=False)


def test_files_beside_the_shards_are_hashed_and_not_loaded(root, make_state):
    weights = {"w": torch.rand(9000), "b": torch.ones(3)}
    weights["alias"] = weights["w"]
    path = Checkpointer(root).save(7, make_state(7), extra={"model_state_dict/full_weights.pt": weights}).path
    file = path / "actor/model_state_dict/full_weights.pt"
    held = torch.load(file, weights_only=True)
    assert (
        held["w"].equal(weights["w"])
        and held["alias"].data_ptr() == held["w"].data_ptr()
        and torch.equal(held["b"], weights["b"])
    )
    assert f"actor/{file.relative_to(path / 'actor')}" in manifest.read(path).files
    assert Checkpointer(root).load(path, make_state(1)).num_bytes > file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek(9000)
        stream.write(b"other")
    with pytest.raises(DamagedCheckpoint, match=r"full_weights\.pt: its blake3"):
        Checkpointer(root).load(path, make_state(1))


def test_weights_alone(root, saved):
    state, before = Files(), random.getstate()
    report = Checkpointer(root).load(saved, state, whole=False)
    assert state.weight.eq(2.0).all() and state.flat.eq(0.5).all()
    assert not report.rng_restored and random.getstate() == before


def test_the_command_line(root, saved, capsys):
    assert main(["verify", str(saved)]) == 0
    assert main(["ls", str(root)]) == 0
    capsys.readouterr()
    assert main(["show", str(saved)]) == 0
    shown = capsys.readouterr().out
    assert "distrib_optim.pt: 1 tensors, 15,000 elements" in shown and f"actor/iter_0000005/{MODEL}" in shown

    same = Checkpointer(root.parent / "other").save(5, Files(2.0), info={"run": "x"}).path
    state = Files(2.0)
    state.flat[7] = 9.0
    changed = Checkpointer(root.parent / "changed").save(5, state, info={"run": "x"}).path
    capsys.readouterr()
    assert main(["diff", "--json", str(saved), str(same)]) == 0
    assert json.loads(capsys.readouterr().out)["same"]
    random.random()
    drawn = Checkpointer(root.parent / "drawn").save(5, Files(2.0), info={"run": "x"}).path
    assert main(["diff", str(saved), str(changed)]) == 1
    shown = capsys.readouterr().out
    assert "mp_rank_00/distrib_optim.pt:0.float32+float32.param float32 [15000]: 1 of 15000 elements" in shown
    assert main(["diff", str(saved), str(drawn)]) == 1
    assert "mp_rank_00/model_optim_rng.pt:rng" in capsys.readouterr().out
