"""An engine that generates as soon as it has weights says which it had."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from weight_case import Case

from rlinf_lite.cluster.group import wait_all
from rlinf_lite.cluster.weight_sync import ObjectStoreSync, RegionSync
from rlinf_lite.errors import WeightsDiffer
from rlinf_lite.types import MiniBatch, Normalizers

pytestmark = pytest.mark.usefixtures("fake_ray")


@pytest.mark.parametrize("transport", [ObjectStoreSync, RegionSync])
@pytest.mark.parametrize("is_damaged", [False, True])
def test_an_engine_that_begins_ahead_says_which_weights_it_had(monkeypatch, transport, is_damaged):
    case = Case(transport)
    case.sync.publish(0)
    case.train()
    began_with = []
    engine, model = case.worker(0).engine, case.worker(0).model
    monkeypatch.setattr(engine, "generate", lambda _: began_with.append(case.has_weights(0)) or [])
    if is_damaged:
        summed = case.worker(0).sum_weights
        monkeypatch.setattr(
            case.worker(0), "sum_weights", lambda step: (model.lm_head.weight.data.neg_(), summed(step))
        )
    arriving = case.sync.start(1, 1)
    batch = SimpleNamespace(stream="train", step=2)
    call = case.rollouts.start_generate_ahead(0, batch, 1, arriving.arrived[0])
    assert len(arriving.arrived) == 1
    case.sync.publish(1)
    assert case.has_weights(1) and case.worker(1)._summed is None, "this one has compared"
    made = wait_all([call])[0]
    assert (made.rank, made.groups, began_with) == (0, [], [not is_damaged])
    if is_damaged:
        with pytest.raises(WeightsDiffer, match=r"^Engines rank 0: .* after step 1 .*; lm_head\.weight is the first"):
            arriving.compare("Engines rank 0", made.weights)
    else:
        arriving.compare("Engines rank 0", made.weights)


@pytest.mark.parametrize("num_ahead", [1, 2])
@pytest.mark.parametrize("transport", [ObjectStoreSync, RegionSync])
def test_an_engine_whose_weights_did_not_come_generates_nothing(monkeypatch, transport, num_ahead):
    case = Case(transport)
    case.sync.publish(0)
    generated = []
    for rank in (0, 1):
        monkeypatch.setattr(case.worker(rank).engine, "generate", generated.append)

    def fail(*_: Any) -> None:
        raise ValueError("no rows")

    monkeypatch.setattr(case.session.actors[1].worker.trainer, "weights", fail)
    arriving = case.sync.start(1, num_ahead)
    for rank, arrived in enumerate(arriving.arrived):
        case.rollouts.start_generate_ahead(rank, SimpleNamespace(stream="train", step=2), 1, arrived)
    with pytest.raises(ValueError, match="no rows") as raised:
        case.sync.publish(1)
    assert "Actors rank 1" in str(raised.value.__notes__) and not generated


@pytest.mark.parametrize("num_ahead", [1, 2])
def test_engines_are_told_of_what_an_update_has_written(monkeypatch, num_ahead):
    case, began_with = updated(monkeypatch), []
    for rank in (0, 1):
        engine = case.worker(rank).engine
        monkeypatch.setattr(engine, "generate", lambda _, rank=rank: began_with.append(case.has_weights(rank)) or [])
    for step in (1, 2):
        update(case, step)
        arriving = case.sync.start(step, num_ahead)
        assert arriving.arrived == [None] * num_ahead
        batch = SimpleNamespace(stream="train", step=step + 1)
        calls = [case.rollouts.start_generate_ahead(rank, batch, step, None) for rank in range(num_ahead)]
        case.sync.publish(step)
        for made in wait_all(calls):
            arriving.compare("Engines", made.weights)
        assert case.has_weights(0) and case.has_weights(1)
    assert began_with == [True] * 2 * num_ahead
    assert not case.log.count("write_region") and not case.log.count("row_checksums"), "they came with the updates"


def test_an_engine_that_waits_for_an_update_that_fails_generates_nothing(monkeypatch):
    case, generated = updated(monkeypatch), []
    monkeypatch.setattr(case.worker(0).engine, "generate", generated.append)

    def fail(*_: Any) -> None:
        raise ValueError("not finite")

    monkeypatch.setattr(case.session.actors[1].worker, "update", fail)
    reports = update(case, 1)
    arriving = case.sync.start(1, 1)
    call = case.rollouts.start_generate_ahead(0, SimpleNamespace(stream="train", step=2), 1, arriving.arrived[0])
    with pytest.raises(ValueError, match="not finite"):
        wait_all(reports)
    with pytest.raises(BrokenPipeError, match="sender 1 has ended"):
        wait_all([call])
    assert not generated


def test_a_replaced_engine_and_a_step_without_an_update_are_served_by_calls(monkeypatch):
    case = updated(monkeypatch)
    case.train()  # as a step whose policy was not updated, but loaded
    assert case.sync.start(1, 1).arrived != [None]
    case.sync.publish(1)
    assert case.has_weights(0) and case.has_weights(1)
    case.sync.send_to(0)
    assert case.policy.written_by_update(2) is None and case.policy._write_precision is None
    case.train()
    case.sync.publish(2)
    assert case.has_weights(0) and case.policy._write_precision == "bf16", "the next publish opens a region again"


def updated(monkeypatch) -> Any:
    """A case whose engines have the region; ``log``: the calls of the policy's ranks."""
    case: Any = Case(RegionSync)
    case.log = []
    case.sync.publish(0)
    for rank in (0, 1):
        worker = case.session.actors[rank].worker
        monkeypatch.setattr(worker, "update", lambda step, batch, last, rank=rank: case.train() if not rank else None)
    original = case.policy.start
    monkeypatch.setattr(case.policy, "start", lambda name, *args: (case.log.append(name), original(name, *args))[1])
    return case


def update(case: Any, step: int) -> Any:
    """As the last update of a step, of a batch without units."""
    case.policy._virtual_ranks, case.policy._tensor_parallel = 1, 1
    norm = Normalizers(num_tokens=1, num_sequences=1)
    return case.policy.start_update(step, MiniBatch(units=(), norm=norm), last=True)
