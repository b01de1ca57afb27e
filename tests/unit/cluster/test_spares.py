"""Spare processes: how many there are, and which is taken."""

from __future__ import annotations

import pytest
from fake_ray import FakeSession

from rlinf_lite.cluster.spares import Spares
from rlinf_lite.config import ClusterConfig

pytestmark = pytest.mark.usefixtures("fake_ray")


def a_session(**changes) -> FakeSession:
    changes = {"nodes": ("a", "b"), "config": ClusterConfig(warm_spares=2), **changes}
    return FakeSession(lambda target, *args: None, **changes)


def test_so_many_on_each_node_and_again_what_died_or_was_taken():
    session = a_session()
    spares = Spares(session)
    spares.start()
    assert sorted(actor.node for actor in session.actors) == ["a", "a", "b", "b"]
    spares.start()
    assert len(session.actors) == 4, "looked at just before"
    taken = spares.take(0)
    assert taken is not None
    next(actor for actor in session.actors if actor.node == "b").die()
    spares._next_look = 0.0
    spares.start()
    assert [actor.node for actor in session.actors[4:]].count("a") == 1 and len(session.actors) == 6


def test_one_of_the_same_node_that_lives_is_taken():
    session = a_session()
    spares = Spares(session)
    assert spares.take(0) is None
    spares.start()
    on_a = [actor for actor in session.actors if actor.node == "a"]
    on_a[0].die()
    assert spares.take(0)._actor is on_a[1]
    assert spares.take(0) is None, "those of the other node are not for this slot"


def test_none_on_gpus():
    session = a_session(device="cuda")
    Spares(session).start()
    assert session.actors == []


def test_all_are_ended():
    session = a_session()
    spares = Spares(session)
    spares.start()
    spares.kill()
    assert not any(actor.alive for actor in session.actors) and spares.take(0) is None
