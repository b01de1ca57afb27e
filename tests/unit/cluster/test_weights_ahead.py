"""An engine that generates as soon as it has weights says which it had."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from weight_case import Case

from rlinf_lite.cluster.group import wait_all
from rlinf_lite.cluster.weight_sync import ObjectStoreSync, RegionSync
from rlinf_lite.errors import WeightsDiffer

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
