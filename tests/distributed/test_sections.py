"""Two sections, actor/ and critic/, with ranks of their own: saved and loaded together, each resharded by itself."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from rlinf_lite.checkpoint import Checkpointer, CheckpointError, flatten, layout, manifest, select, state_digest
from rlinf_lite.checkpoint.formats.data_file import read_data
from rlinf_lite.checkpoint.formats.read_state import read_tensors

TWO_AND_ONE, ONE_AND_TWO = {"actor": 2, "critic": 1}, {"actor": 1, "critic": 2}
ROWS = {"actor": 7, "critic": 5}
"""Tensors of the same names have other shapes in the other section."""


def full_state(section, seed):
    """What the ranks of a section hold together."""
    generator = torch.Generator().manual_seed(seed + ROWS[section])
    rows = ROWS[section]
    weights = {"embed": torch.randn(rows, 4, generator=generator), "bias": torch.randn(1, generator=generator)}
    moments = {
        name: {"step": torch.tensor(float(seed)), "exp_avg": torch.randn(weight.shape, generator=generator)}
        for name, weight in weights.items()
    }
    own = {"value_head": torch.randn(rows, generator=generator)} if section == "critic" else {}
    return {"model": weights | own, "optim": moments, "updates": torch.tensor(seed)}


def join(rank, counts):
    """This rank's section, and the mesh of its ranks: the ranks of the first section come first."""
    first, mine = 0, None
    for section, count in counts.items():
        ranks = range(first, first + count)
        mesh = DeviceMesh("cpu", [*ranks])  # made on all ranks
        if rank in ranks:
            mine = section, mesh
        first += count
    return mine


def shard(value, mesh):
    if isinstance(value, dict):
        return {name: shard(part, mesh) for name, part in value.items()}
    return distribute_tensor(value, mesh, [Shard(0)]) if value.dim() else value.clone()


def whole(state):
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in flatten(state).items()}


def draw():
    return [random.gauss(0, 1), random.random(), np.random.standard_normal(), torch.rand(()).item()]


def seed_with(seed):
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


def save_all(rank, world_size, root, counts, steps, background=False):
    """Save each step; returns what is drawn after the last save, and its report's size."""
    section, mesh = join(rank, counts)
    seed_with(rank)
    checkpointer = Checkpointer(root, seed=7, section=section, timeout_seconds=20)
    for step in steps:
        state = shard(full_state(section, step), mesh)
        if background:
            checkpointer.start(step, state, data={"step": step}, info={})
            checkpointer.fence()
            for tensor in flatten(state).values():
                tensor.fill_(-1)  # as the optimizer step that the fence waits for
            report = checkpointer.finish()
        else:
            report = checkpointer.save(step, state, data={"step": step}, info={})
    return draw(), report.num_bytes


def load_each(rank, world_size, paths, counts, whole_state=True, verify="full"):
    """What becomes of each checkpoint: the section and its whole state, or the error."""
    section, mesh = join(rank, counts)
    checkpointer, heard = Checkpointer(paths[0].parent, seed=7, section=section), []
    for path in paths:
        seed_with(100)
        state = shard(full_state(section, -1), mesh)
        asked = state if whole_state else {"model": state["model"]}
        if not whole_state and section == "critic":
            asked = {}
        try:
            report = checkpointer.load(path, asked, verify=verify, whole=whole_state)
        except CheckpointError as error:
            heard.append((type(error).__name__, str(error)))
        else:
            heard.append((section, whole(state), report.rng_restored, draw()))
    return heard


def assert_whole(section, loaded, step):
    expected = flatten(full_state(section, step))
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), f"{section}: {name}"


def shards(counts):
    return [f"{section}/__{place}_0.distcp" for section, count in counts.items() for place in range(count)]


def files_of(path):
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("counts", [TWO_AND_ONE, ONE_AND_TWO], ids=["2+1", "1+2"])
def test_each_section_comes_back_whole_with_the_rng_state_of_each_rank(run_ranks, tmp_path, counts):
    """In new processes; saved in the background, while the state changes, and not: the same bytes."""
    saved = run_ranks(save_all, 3, root=tmp_path / "a", counts=counts, steps=[3])
    again = run_ranks(save_all, 3, root=tmp_path / "b", counts=counts, steps=[3], background=True)
    assert saved == again
    path, other = tmp_path / "a" / "global_step_3", tmp_path / "b" / "global_step_3"
    metadata = ["actor/.metadata", "critic/.metadata"]
    assert files_of(path) == sorted([*metadata, *shards(counts), "data/data.pt", "manifest.json"])
    assert all((path / file).read_bytes() == (other / file).read_bytes() for file in files_of(path))
    about = manifest.read(path)
    assert about.world_size == counts["actor"]
    assert about.ranks_of() == {"actor": tuple(range(counts["actor"])), "critic": tuple(range(counts["actor"], 3))}
    assert {num_bytes for _, num_bytes in saved} == {sum(record.size for record in about.files.values())}
    for section in counts:
        tensors = read_tensors(path / section)
        rng = sorted({name.split(".")[1] for name in tensors if name.startswith("rng.")})
        assert rng == [f"rank{rank}" for rank in about.ranks_of()[section]]
        assert_whole(section, {n: t for n, t in tensors.items() if not n.startswith("rng.")}, 3)

    for rank, ((section, loaded, restored, drawn),) in enumerate(run_ranks(load_each, 3, paths=[path], counts=counts)):
        assert section == ("actor" if rank < counts["actor"] else "critic")
        assert_whole(section, loaded, 3)
        assert restored and drawn == saved[rank][0]


def load_and_save(rank, world_size, path, counts, root):
    heard = load_each(rank, world_size, [path], counts)
    save_all(rank, world_size, root, counts, [3])
    return heard[0]


def test_each_section_is_resharded_by_itself(run_ranks, tmp_path):
    """2+1 -> 1+2 -> 3+1 -> 1+1, each loading what the last one saved."""
    run_ranks(save_all, 3, root=tmp_path, counts=TWO_AND_ONE, steps=[3])
    path = tmp_path / "global_step_3"
    for number, counts in enumerate((ONE_AND_TWO, {"actor": 3, "critic": 1}, {"actor": 1, "critic": 1})):
        root = tmp_path / str(number)
        answers = run_ranks(load_and_save, sum(counts.values()), path=path, counts=counts, root=root)
        for section, loaded, restored, _ in answers:
            assert_whole(section, loaded, 3)
            assert not restored
        assert len({tuple(drawn) for *_, drawn in answers}) == len(answers)
        path = root / "global_step_3"


KILLS = [(0, "save.halfway"), (2, "save.halfway"), (2, "save.metadata"), (0, "save.rename")]


@pytest.mark.parametrize("killed, phase", KILLS)
def test_a_rank_of_either_section_killed_in_the_middle_of_a_save(start_ranks, run_ranks, tmp_path, killed, phase):
    fault = {"phase": phase, "step": 8, "action": "kill", "rank": killed}
    environment = {"RLINF_LITE_FAULTS": json.dumps([fault])}
    ranks = start_ranks(
        save_all, 3, root=tmp_path, counts=TWO_AND_ONE, steps=[4, 8], background=True, environment=environment
    )
    ranks.processes[killed].join(60)
    assert ranks.processes[killed].exitcode == -9
    ranks.stop()
    chosen = select("auto", tmp_path, verify="full")
    assert chosen.manifest.step == 4 and not chosen.skipped
    assert len(layout.sweep(tmp_path)) <= 1  # none if a survivor has noticed and cleaned up
    for ((section, loaded, restored, _),) in run_ranks(load_each, 3, paths=[chosen.path], counts=TWO_AND_ONE):
        assert_whole(section, loaded, 4)
        assert restored


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def lose_the_critic(path):
    shutil.rmtree(path / "critic")


def exchange_sections(path):
    (path / "actor").rename(path / "other")
    (path / "critic").rename(path / "actor")
    (path / "other").rename(path / "critic")


def test_damage_in_either_section_is_heard_by_all_ranks_and_stepped_over(run_ranks, tmp_path):
    run_ranks(save_all, 3, root=tmp_path / "good", counts=TWO_AND_ONE, steps=[4, 8])
    names = [*shards(TWO_AND_ONE), "actor/.metadata", "critic/.metadata"]
    damages = {f"flip{n}": lambda path, name=name: flip(path / name) for n, name in enumerate(names)}
    damages |= {"lose": lose_the_critic, "exchange": exchange_sections}
    paths = []
    for case, damage in damages.items():
        root = tmp_path / case
        shutil.copytree(tmp_path / "good", root)
        damage(root / "global_step_8")
        chosen = select("auto", root, verify="full")
        assert chosen.path == root / "global_step_4" and len(chosen.skipped) == 1
        paths += [root / "global_step_8", root / "global_step_4"]
    for counts in (TWO_AND_ONE, ONE_AND_TWO):
        by_path = [*zip(*run_ranks(load_each, 3, paths=paths, counts=counts), strict=True)]
        for of_damaged, of_good in zip(by_path[::2], by_path[1::2], strict=True):
            assert len(set(of_damaged)) == 1, "all ranks hear the same"
            kind, text = of_damaged[0]
            assert kind in ("DamagedCheckpoint", "UnsafeCheckpoint") and "global_step_8" in text
            for section, loaded, *_ in of_good:
                assert_whole(section, loaded, 4)


def test_sections_that_are_missing_or_not_loaded(run_ranks, tmp_path):
    """A whole load wants exactly its own sections. A load of model weights ignores others, but verifies them."""
    run_ranks(save_all, 2, root=tmp_path / "alone", counts={"actor": 2}, steps=[3])
    run_ranks(save_all, 3, root=tmp_path / "both", counts=TWO_AND_ONE, steps=[3])
    alone, both = (tmp_path / name / "global_step_3" for name in ("alone", "both"))
    damaged = tmp_path / "damaged" / "global_step_3"
    shutil.copytree(both, damaged)
    flip(damaged / "critic" / "__0_0.distcp")

    missing = f"{alone}: has no section critic/, only actor/; give a checkpoint that has it, or start a new run from "
    extra = f"{both}: has a section critic/, which none of these ranks loads; resume with the config of the run that "
    for counts, path, message in ((TWO_AND_ONE, alone, missing), ({"actor": 2}, both, extra)):
        for ((kind, text),) in run_ranks(load_each, sum(counts.values()), paths=[path], counts=counts):
            assert kind == "SectionMismatch" and text.startswith(message) and "runner.resume_mode=weights" in text

    for counts in ({"actor": 1}, TWO_AND_ONE):
        answers = run_ranks(
            load_each, sum(counts.values()), paths=[both, alone, damaged], counts=counts, whole_state=False
        )
        for from_both, from_alone, (kind, text) in answers:
            assert kind == "DamagedCheckpoint" and "critic/__0_0.distcp: its blake3" in text
            for section, loaded, restored, _ in (from_both, from_alone):
                step = 3 if section == "actor" else -1
                expected = {
                    **flatten(full_state(section, -1)),
                    **flatten({"model": full_state(section, step)["model"]}),
                }
                assert not restored and all(torch.equal(loaded[name], expected[name]) for name in expected)


def wrong_names(rank, world_size, root):
    heard = []
    for name in ("Critic", "data", "", "a/b"):
        try:
            Checkpointer(root, section=name if rank == 1 else "actor")
        except ValueError as error:
            heard.append(str(error))
    return heard


def test_a_name_that_no_section_can_have_is_refused_on_all_ranks(run_ranks, tmp_path):
    first, second = run_ranks(wrong_names, 2, root=tmp_path)
    assert first == second and len(first) == 4
    assert first[0] == "section='Critic': use lower-case letters, digits and _, as in 'actor'; not 'data'"


def train(rank, world_size, root, resume_from):
    """Four steps of two fully sharded models, saved in the background; or the last two from a checkpoint."""
    section, mesh = join(rank, TWO_AND_ONE)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, ROWS[section]), torch.nn.Tanh(), torch.nn.Linear(ROWS[section], 3))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for param in model.parameters():
        zeros = {name: torch.zeros_like(param.detach()) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[param] = {"step": torch.tensor(0.0), **zeros}
    state = {"model": model, "optim": {name: optimizer.state[param] for name, param in model.named_parameters()}}
    torch.manual_seed(rank)
    checkpointer = Checkpointer(root, seed=7, section=section)
    optimizer.register_step_pre_hook(lambda *_: checkpointer.fence())
    if resume_from is not None:
        checkpointer.load(resume_from, state)
    for step in range(3, 5) if resume_from else range(1, 5):
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        checkpointer.start(step, state, data={"step": step}, info={})
    checkpointer.finish()
    return state_digest(flatten(state))


def test_two_sharded_models_train_on_to_the_same_bits(run_ranks, tmp_path):
    straight = run_ranks(train, 3, root=tmp_path / "straight", resume_from=None)
    resumed = run_ranks(train, 3, root=tmp_path / "resumed", resume_from=tmp_path / "straight" / "global_step_2")
    assert straight == resumed and straight[0] == straight[1] != straight[2]
    last = [tmp_path / run / "global_step_4" for run in ("straight", "resumed")]
    assert manifest.read(last[0]).files == manifest.read(last[1]).files, "RNG state included"
    assert read_data(last[0]) == {"step": 4}
