"""Checkpoints with several sections, as the tools, manifests and readers of one process see them."""

import dataclasses
import json
import shutil

import pytest
import torch

from rlinf_lite.checkpoint import (
    Checkpointer,
    CheckpointManager,
    DamagedCheckpoint,
    MemoryCheckpoints,
    NoCheckpoint,
    SectionMismatch,
    select,
)
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.eval.source import opened


@pytest.fixture
def both(save, add_critic, make_state):
    """A checkpoint of step 5 with the sections actor/ and critic/."""
    return add_critic(save(5), make_state(6))


def test_a_section_alone(root, make_state):
    saved = Checkpointer(root, seed=7, section="critic")
    path = saved.save(5, make_state(5)).path
    assert sorted(file.name for file in path.iterdir()) == ["critic", "data", "manifest.json"]
    assert manifests.read(path).ranks_of() == {"critic": (0,)}
    state = make_state(6)
    assert Checkpointer(root, section="critic").load(path, state).rng_restored
    assert torch.equal(state["optim"]["counts"], make_state(5)["optim"]["counts"])
    with pytest.raises(SectionMismatch, match=r"global_step_5: has no section actor/, only critic/; give a checkpoint"):
        Checkpointer(root).load(path, state)


def test_only_two_sections_are_named_in_the_manifest(save, both):
    assert "sections" not in json.loads((save(4) / "manifest.json").read_text())
    assert json.loads((both / "manifest.json").read_text())["sections"] == {"actor": [0], "critic": [1]}


@pytest.mark.parametrize(
    "sections",
    [
        {"actor": [0], "critic": [0]},
        {"actor": [0], "critic": [2]},
        {"actor": [0], "critic": []},
        {"actor": [0, 1]},
        {"actor": [0], "../x": [1]},
        {"actor": [0], "data": [1]},
        {"actor": [0], "critic": ["1"]},
        {"actor": [0], "critic": 1},
        ["actor"],
        None,
    ],
)
def test_sections_that_no_save_writes_are_refused(both, sections):
    body = json.loads((both / "manifest.json").read_text())
    del body["digest"]
    body["sections"] = sections
    (both / "manifest.json").write_text(json.dumps({**body, "digest": manifests._digest(body)}))
    with pytest.raises(DamagedCheckpoint, match="not a manifest"):
        manifests.read(both)


@pytest.mark.parametrize("name", ["critic/__0_0.distcp", "critic/.metadata"])
def test_damage_in_the_critic_is_noticed_and_stepped_over(save, both, root, cli, name):
    older = save(4)
    assert cli("verify", root)[0] == 0
    content = bytearray((both / name).read_bytes())
    content[len(content) // 2] ^= 1
    (both / name).write_bytes(content)
    code, out, _ = cli("verify", root)
    assert code == 1 and f"BAD  {both}: {both}/{name}: its blake3" in out
    chosen = select("auto", root, verify="full")
    assert chosen.path == older and name in chosen.skipped[0]


def test_ls_and_show_list_the_sections(both, root, cli, cli_json):
    assert cli_json("ls", root)[1][0]["num_ranks"] == {"actor": 1, "critic": 1}
    assert " 1+1" in cli("ls", root)[1].splitlines()[1]
    assert list(cli_json("show", both)[1]["sections"]["critic"]) == ["model", "optim", "rng"]
    lines = cli("show", both)[1].splitlines()
    headings = [line for line in lines if "written by" in line]
    assert headings == [f"{name}: 12 tensors, written by 1 rank" for name in ("actor", "critic")]


def test_diff_compares_all_sections(both, root, add_critic, make_state, cli_json, tmp_path):
    copy = shutil.copytree(both, tmp_path / "copy")
    assert cli_json("diff", both, copy)[1]["same"]
    shutil.rmtree(copy / "critic")
    state = make_state(6)
    state["optim"]["counts"][1] += 1
    add_critic(copy, state)
    found = cli_json("diff", "--tensors-only", both, copy)[1]
    names = [tensor["name"] for tensor in found["tensors"] if not tensor["name"].startswith("critic/rng.")]
    assert names == ["critic/optim.counts"] and found["forms"] == []

    shutil.rmtree(copy / "critic")
    manifest = manifests.read(copy)
    files = {name: record for name, record in manifest.files.items() if not name.startswith("critic/")}
    (copy / "manifest.json").write_text(dataclasses.replace(manifest, files=files, sections={}).to_json())
    found = cli_json("diff", both, copy)[1]
    assert {(form["name"].partition("/")[0], form["b"]) for form in found["forms"]} == {("critic", None)}
    assert found["tensors"] == [] and [item["name"] for item in found["manifest"]] == ["sections"]


def test_a_whole_load_wants_all_sections_and_weights_alone_do_not(both, root, make_state):
    state = make_state(0)
    with pytest.raises(SectionMismatch, match=r"global_step_5: has a section critic/, which none of these ranks loads"):
        Checkpointer(root).load(both, state)
    assert not torch.equal(state["model"]["layer.weight"], make_state(5)["model"]["layer.weight"])
    assert not Checkpointer(root).load(both, {"model": state["model"]}, whole=False).rng_restored
    assert torch.equal(state["model"]["layer.weight"], make_state(5)["model"]["layer.weight"])


def test_a_manager_loads_the_weights_of_the_actor(tmp_path, add_critic, make_state):
    model, other = (torch.nn.Linear(3, 2) for _ in range(2))
    manager = CheckpointManager(tmp_path / "managed")
    optimizer = torch.optim.AdamW(model.parameters())
    path = add_critic(manager.save(model, optimizer, {"epoch": 1}).path, make_state(0))
    manager.load(other, checkpoint_path=path)
    assert torch.equal(model.weight, other.weight)
    with pytest.raises(SectionMismatch, match="has a section critic/"):
        manager.load(other, torch.optim.AdamW(other.parameters()), path)


def test_a_replica_of_another_section_is_refused(make_state):
    taken = MemoryCheckpoints(section="critic").take(5, make_state(5))
    files = {**taken.small, **taken.shard}
    assert sorted(files) == ["critic/.metadata", "critic/__0_0.distcp", "data/data.pt", "manifest.json"]
    assert MemoryCheckpoints(section="critic").load(5, files, make_state(0)).rng_restored
    with pytest.raises(SectionMismatch, match=r"\(memory\)/global_step_5: has no section actor/, only critic/"):
        MemoryCheckpoints().load(5, files, make_state(0))


def test_evaluating_needs_the_actor(both, root, make_state):
    with opened(str(both), "full") as source:
        assert source.section_dir == both / "actor"
        assert source.fingerprint() == source.manifest.weights_fingerprint("actor")
        assert source.fingerprint() != source.manifest.weights_fingerprint("critic")
    with pytest.raises(NoCheckpoint, match="is a part of a checkpoint; did you mean"), opened(f"{both}/critic", "full"):
        pass
    path = Checkpointer(root, section="critic").save(6, make_state(6)).path
    with pytest.raises(SectionMismatch, match="has no section actor/, only critic/"), opened(str(path), "full"):
        pass
