"""Publishing weights: every engine gets what the ranks hold, and one that does not have it is an error."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from weight_case import Case

from rlinf_lite.cluster import weight_sync
from rlinf_lite.cluster.errors import WorkerLost
from rlinf_lite.cluster.group import wait_all
from rlinf_lite.cluster.placement import parse
from rlinf_lite.cluster.weight_sync import (
    CollectiveSync,
    ObjectStoreSync,
    RegionSync,
    SharedMemorySync,
    build_weight_sync,
)
from rlinf_lite.cluster.workers import policy_worker
from rlinf_lite.errors import ConfigError, WeightsDiffer
from rlinf_lite.weights.region import Region
from rlinf_lite.weights.shared import OpenWeights
from rlinf_lite.weights.transport import pack

pytestmark = pytest.mark.usefixtures("fake_ray")


@pytest.mark.parametrize("transport", [ObjectStoreSync, SharedMemorySync, RegionSync])
def test_every_engine_gets_the_current_weights(transport):
    case = Case(transport)
    for step in range(3):
        case.sync.publish(step)
        assert case.has_weights(0) and case.has_weights(1)
        case.train()


def test_an_engine_that_keeps_the_weights_of_the_step_before_is_an_error(monkeypatch):
    case = Case()
    case.sync.publish(4)
    monkeypatch.setattr(case.worker(1).engine, "load_weights", lambda weights: None)
    case.sync.publish(4)  # the same weights: nothing differs
    case.train()
    with pytest.raises(
        WeightsDiffer, match=r"Engines rank 1: .* the weights after step 5 .*; model.embed_tokens.weight"
    ):
        case.sync.publish(5)


def test_the_first_weight_that_differs_is_named(monkeypatch):
    case = Case()
    engine = case.worker(0).engine
    load = engine.load_weights
    monkeypatch.setattr(
        engine, "load_weights", lambda weights: load(w for w in weights if "layers.1.mlp" not in w.name)
    )
    case.train()
    with pytest.raises(WeightsDiffer, match=r"model\.layers\.1\.mlp\.gate_proj\.weight is the first"):
        case.sync.publish(1)


def test_rows_that_change_while_they_are_packed_are_noticed(monkeypatch):
    def damaging(pieces: Any) -> Any:
        packed = pack(pieces)
        packed["model.norm.weight"][2][0] ^= 1
        return packed

    case = Case()
    monkeypatch.setattr(policy_worker, "pack", damaging)
    with pytest.raises(WeightsDiffer, match=r"model\.norm\.weight is the first"):
        case.sync.publish(1)


def test_the_results_of_a_replaced_engine_count_only_if_it_has_the_weights(monkeypatch):
    case = Case()
    case.sync.publish(3)
    case.sync.send_to(1)
    wait_all([case.rollouts.start_one(1, "sleep")])
    monkeypatch.setattr(case.worker(1).engine, "load_weights", lambda weights: None)
    case.train()
    case.sync.send_to(1)
    with pytest.raises(WeightsDiffer, match="after step 3"):
        wait_all([case.rollouts.start_one(1, "sleep")])


@pytest.mark.parametrize(
    ("device", "actor", "rollout", "builtin", "auto"),
    [
        ("cpu", "0-1", "0", True, RegionSync),
        ("cpu", "0-1", "0", False, ObjectStoreSync),
        ("cuda", "0", "0", True, SharedMemorySync),
        ("cuda", "0", "0", False, ObjectStoreSync),
        ("cuda", "0-1", "0-1", True, ObjectStoreSync),
        ("cuda", "0", "1", True, CollectiveSync),
    ],
)
def test_shared_memory_is_for_cpus_and_one_gpu(device, actor, rollout, builtin, auto):
    placement = parse({"actor": actor, "rollout": rollout, "reward": "0"}, 2)
    rollouts = SimpleNamespace(can_share_weights=builtin)

    def built(kind: str) -> Any:
        config = SimpleNamespace(weight_sync=kind)
        session = SimpleNamespace(placement=placement, device=device, config=config)
        return build_weight_sync(session, SimpleNamespace(write_after_updates=lambda _: None), rollouts, "bf16")

    assert type(built("auto")) is auto
    if auto in (SharedMemorySync, RegionSync):
        assert type(built("shared_memory")) is auto
    else:
        with pytest.raises(ConfigError, match="weight_sync=shared_memory"):
            built("shared_memory")


def test_shared_memory_is_opened_again_for_a_replaced_engine():
    case = Case(SharedMemorySync)
    case.sync.publish(1)
    old = case.worker(1).model.lm_head.weight
    case.session.actors[3].worker = case.rollout_worker(1)
    case.sync.send_to(1)
    wait_all([case.rollouts.start_one(1, "sleep")])
    case.train()
    case.sync.publish(2)
    assert torch.equal(case.model.lm_head.weight.bfloat16(), case.worker(1).model.lm_head.weight)
    assert not torch.equal(case.model.lm_head.weight.bfloat16(), old)


def test_shared_memory_that_nothing_was_written_to_is_an_error(monkeypatch):
    case = Case(SharedMemorySync)
    case.sync.publish(1)
    case.train()
    monkeypatch.setattr(OpenWeights, "write", lambda self, pieces: list(pieces))
    with pytest.raises(WeightsDiffer, match="after step 2"):
        case.sync.publish(2)


@pytest.mark.parametrize("transport", [ObjectStoreSync, RegionSync])
def test_a_planned_flip_is_done(monkeypatch, transport):
    monkeypatch.setattr("rlinf_lite.faults._table", lambda: [{"phase": "rollout.weights", "action": "flip", "step": 2}])
    case = Case(transport)
    case.sync.publish(1)
    with pytest.raises(WeightsDiffer, match="after step 2"):
        case.sync.publish(2)


def test_what_was_started_is_not_sent_twice():
    case = Case()
    case.sync.start(1, 0)
    started = [param.bfloat16() for param in case.model.parameters()]
    case.train()
    case.sync.publish(1)
    assert all(map(torch.equal, case.worker(0).model.parameters(), started)), "what was sent at the start"
    case.sync.publish(1)
    for ours, theirs in zip(case.model.parameters(), case.worker(1).model.parameters(), strict=True):
        assert torch.equal(ours.bfloat16(), theirs), "each start is used once"


# -- one region of shared memory on CPUs


@pytest.fixture(autouse=True)
def unlogged() -> None:
    weight_sync._log_object_store.cache_clear()


def lose_with(case: Case) -> list[WorkerLost]:
    """Repair lost engines as the workers do; the losses."""
    losses = []

    def repair(lost: WorkerLost) -> None:
        losses.append(lost)
        case.rollouts.replace(lost.rank)
        case.session.actors[2 + lost.rank] = case.session.actors.pop()
        case.sync.send_to(lost.rank)

    case.rollouts.repair = repair
    return losses


def test_engines_compute_with_the_region_that_policy_ranks_write():
    case = Case(RegionSync)
    case.sync.publish(0)
    written = case.session.actors[0].worker._region.tensors["model.norm.weight"]
    written[0] = 3.0
    assert [case.worker(rank).model.model.norm.weight[0] for rank in (0, 1)] == [3.0, 3.0]
    assert case.session.actors[1].worker._region.tensors["model.norm.weight"][0] == 3.0


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_a_damaged_region_is_an_error(name):
    case = Case(RegionSync)
    case.sync.publish(0)
    region = case.session.actors[1].worker._region
    write = region.write

    def damaging(pieces: Any) -> None:
        write(pieces)
        region.tensors[name].view(torch.uint8).view(-1)[5] ^= 1

    region.write = damaging
    with pytest.raises(WeightsDiffer, match=rf"Engines rank 0: .* the weights after step 1 .*; {name}"):
        case.sync.publish(1)


def test_rows_that_a_rank_does_not_write_are_an_error():
    case = Case(RegionSync)
    case.sync.publish(0)
    case.session.actors[1].worker._region.write = list
    case.sync.publish(0)  # the same weights: nothing differs
    case.train()
    with pytest.raises(WeightsDiffer, match="after step 1"):
        case.sync.publish(1)


def test_what_was_started_is_in_the_region_and_not_sent_twice():
    case = Case(RegionSync)
    case.sync.start(0, 0)
    assert case.session.actors[0].worker._region is None, "to open it is to wait"
    case.sync.publish(0)
    case.train()
    case.sync.start(1, 0)
    assert case.has_weights(0) and case.has_weights(1)
    started = [param.bfloat16() for param in case.model.parameters()]
    case.train()
    case.sync.publish(1)
    assert all(map(torch.equal, case.worker(1).model.parameters(), started)), "what was sent at the start"
    case.sync.publish(1)
    assert case.has_weights(0) and case.has_weights(1)


def test_engines_elsewhere_get_their_weights_through_the_object_store(capsys):
    case = Case(RegionSync, nodes=("a", "b"))
    for step in (0, 1):
        case.sync.publish(step)
        assert case.has_weights(0) and case.has_weights(1)
        case.train()
    line = "weights reach rollout rank 0, 1 through Ray's object store (they and all actor ranks are not on one node)"
    assert capsys.readouterr().out.count(line) == 1
    assert case.session.actors[0].worker._region is None

    case.policy.locations = lambda: case.rollouts.locations()[:1] * 2  # both actor ranks beside engine 0
    case.sync = RegionSync(case.policy, case.rollouts, "bf16")
    for step in (2, 3):
        case.sync.publish(step)
        assert case.has_weights(0) and case.has_weights(1)
        case.train()
        case.sync.start(step + 1, 0)
        assert case.has_weights(0) and case.has_weights(1)
    region = case.session.actors[0].worker._region.tensors
    region["model.norm.weight"][0] = 3.0
    assert [case.worker(rank).model.model.norm.weight[0] == 3.0 for rank in (0, 1)] == [True, False]
    assert "rollout rank 1 through Ray's object store" in capsys.readouterr().out


@pytest.mark.parametrize(("fails", "sharing"), [("make", []), ("policy", []), ("rollout", [0])])
def test_without_shared_memory_weights_go_through_the_object_store(monkeypatch, capsys, fails, sharing):
    case = Case(RegionSync)
    case.sync.publish(0)
    case.train()
    case.sync = RegionSync(case.policy, case.rollouts, "bf16")  # as after a recovery; engines have the old region

    def deny(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", "/proc/1/fd/7")

    target = {"make": (0, "make_region"), "policy": (1, "open_region"), "rollout": (3, "open_region")}[fails]
    worker, method = case.session.actors[target[0]].worker, target[1]
    called = getattr(worker, method)

    def denied(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Region, "make", deny)
            patch.setattr(Region, "open", deny)
            return called(*args)

    monkeypatch.setattr(worker, method, denied)
    for step in (1, 2):
        case.sync.publish(step)
        assert case.has_weights(0) and case.has_weights(1)
        case.train()
    assert case.sync._near == sharing
    printed = capsys.readouterr().out
    assert printed.count("through Ray's object store (shared memory: ") == 1
    assert "Permission denied: '/proc/1/fd/7')" in printed


def test_a_replaced_engine_has_the_weights_at_once_and_the_region_from_the_next_publish_on():
    case = Case(RegionSync)
    case.sync.publish(1)
    case.session.actors[3].worker = case.rollout_worker(1)
    case.sync.send_to(1)
    wait_all([case.rollouts.start_one(1, "weight_layout")])
    assert case.has_weights(1)
    old = case.session.actors[0].worker._region
    case.train()
    case.sync.start(2, 0)
    assert not case.has_weights(0) and not case.has_weights(1), "the region's engines may still be asked for something"
    case.sync.publish(2)
    assert case.session.actors[0].worker._region is not old
    assert case.has_weights(0) and case.has_weights(1)


@pytest.mark.parametrize("when", ["before the region is open", "after"])
def test_an_engine_that_dies_is_replaced_within_the_publish(when):
    case = Case(RegionSync)
    if when == "after":
        case.sync.publish(0)
        case.train()
    losses = lose_with(case)
    case.session.actors[3].die()
    case.sync.publish(1)
    assert [(lost.group, lost.rank) for lost in losses] == [("Engines", 1)]
    assert case.has_weights(0) and case.has_weights(1)


@pytest.mark.parametrize("transport", [ObjectStoreSync, SharedMemorySync, RegionSync])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("published", [False, True])
def test_a_lost_policy_rank_is_no_reason_to_replace_an_engine(transport, rank, published):
    case = Case(transport)
    if published:
        case.sync.publish(0)
    losses = lose_with(case)
    case.session.actors[rank].die()
    with pytest.raises(WorkerLost, match=f"Actors rank {rank} was lost"):
        case.sync.publish(1)
    assert not losses
