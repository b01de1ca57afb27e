"""component_placement: slots of each component."""

from __future__ import annotations

import pytest

from rlinf_lite.cluster.placement import parse, shrink
from rlinf_lite.errors import ConfigError


def test_forms():
    assert parse({}, 4).slots == {"actor": (0,), "rollout": (0,), "reward": (0,)}
    assert parse({"actor,rollout": "all", "reward": 0}, 3).slots["rollout"] == (0, 1, 2)
    assert parse({"actor": "0-1", "rollout": "2,4-5", "reward": "0"}, 8).slots["rollout"] == (2, 4, 5)


def test_sharing():
    apart = parse({"actor": "0-1", "rollout": "2-3", "reward": "0"}, 4)
    together = parse({"actor,rollout,reward": "0-1"}, 4)
    assert not apart.collocated() and apart.used == (0, 1, 2, 3) and apart.sharers(0) == 1
    assert together.collocated() and together.used == (0, 1) and together.sharers(0) == 2


def test_a_critic_has_the_slots_of_the_actor_unless_it_is_placed():
    assert parse({}, 4, with_critic=True).slots["critic"] == (0,)
    assert "critic" not in parse({"actor,rollout,reward": "0-1"}, 4).slots
    beside = parse({"actor": "0-1", "rollout": "2", "reward": "0"}, 4, with_critic=True)
    apart = parse({"actor": "0-1", "critic": "3", "rollout": "2", "reward": "0"}, 4, with_critic=True)
    assert (beside.slots["critic"], apart.slots["critic"]) == ((0, 1), (3,))
    assert (beside.used, apart.used) == ((0, 1, 2), (0, 1, 2, 3))


def test_a_critic_has_its_share_of_a_gpu():
    placed = {"actor,rollout,reward": "0-1", "critic": "1"}
    shared = parse(placed, 4, with_critic=True)
    assert [shared.sharers(slot) for slot in (0, 1)] == [2, 3]
    assert shrink(shared, 1, 1).slots == dict.fromkeys(("actor", "critic", "rollout", "reward"), (0,))
    assert shrink(shared, 1, 1).sharers(0) == 3, "the critic has moved there"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"value_model": 0}, "unknown component 'value_model'; the components are actor, critic, rollout, reward"),
        ({"actor,critic,rollout,reward": 0}, "critic is placed, but there is none; set critic.use_critic_model=true"),
        ({"actor": 0, "rollout": 0}, "reward has no slots"),
        ({"actor,rollout,reward": 0, "actor": 1}, "actor is placed twice"),
        ({"actor,rollout,reward": "0-3:0-7"}, "is not a set of slots"),
        ({"actor,rollout,reward": "1,1"}, "is not a set of slots"),
        ({"actor,rollout,reward": "3-1"}, "is not a set of slots"),
    ],
)
def test_refusals(given, said):
    with pytest.raises(ConfigError, match=r"cluster\.component_placement") as caught:
        parse(given, 8)
    assert said in str(caught.value)


def test_a_critic_does_not_stand_in_for_what_is_missing():
    with pytest.raises(ConfigError, match="actor has no slots"):
        parse({"critic,rollout,reward": 0}, 8, with_critic=True)
