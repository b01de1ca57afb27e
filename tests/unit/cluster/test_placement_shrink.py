"""Elastic placement: the same job on fewer slots."""

from __future__ import annotations

import itertools

import pytest

from rlinf_lite.cluster.placement import COMPONENTS, Placement, parse, shrink
from rlinf_lite.errors import ConfigError


def _placed(actor: str, rollout: str, reward: str, critic: str | None = None) -> Placement:
    given = {"actor": actor, "rollout": rollout, "reward": reward, **({"critic": critic} if critic else {})}
    return parse(given, 8, with_critic=critic is not None)


@pytest.mark.parametrize(
    ("placed", "num_slots", "actor", "rollout", "reward"),
    [
        (("0-2", "0", "0"), 3, (0, 1, 2), (0,), (0,)),
        (("0-2", "0", "0"), 2, (0, 1), (0,), (0,)),
        (("0-2", "0", "0"), 1, (0,), (0,), (0,)),
        (("0-2", "0-2", "1,2"), 2, (0, 1), (0, 1), (1,)),
        (("0-2", "2", "2"), 2, (0, 1), (0,), (0,)),
        (("0-1", "2-3", "0"), 3, (0, 1), (2,), (0,)),
        (("0-1", "2-3", "0"), 2, (0, 1), (0, 1), (0,)),
        (("0-1", "2-3", "3"), 1, (0,), (0,), (0,)),
        (("2-3", "0-1", "0"), 2, (0, 1), (0, 1), (0,)),
        (("2,0,1", "0", "0"), 2, (0, 1), (0,), (0,)),
        (("1,5", "3", "7"), 2, (1,), (3,), (3,)),
    ],
)
def test_keeps_the_first_slots(placed, num_slots, actor, rollout, reward):
    left = shrink(_placed(*placed), num_slots, 1)
    assert left.slots == {"actor": actor, "rollout": rollout, "reward": reward}


def test_nothing_lost_nothing_changed():
    whole = _placed("0-2", "0", "0")
    assert shrink(whole, 3, 1) is whole
    assert shrink(whole, 9, 1) is whole


def test_bundles_fit_whatever_is_left():
    choices = ("0", "1", "2", "0-1", "1-2", "0-2", "2,0", "3", "2-3", "0-3")
    of_critic = (None, "0", "1-2", "3")
    for placed in itertools.product(choices, choices, choices, of_critic):
        whole = _placed(*placed)
        for num_slots in range(1, len(whole.used) + 1):
            left = shrink(whole, num_slots, 1)
            assert left.used == whole.used[:num_slots]
            assert set(COMPONENTS) - {"critic"} <= left.slots.keys() == whole.slots.keys()
            assert all(left.slots[name] for name in whole.slots)
            assert all(len(left.slots[name]) <= len(whole.slots[name]) for name in whole.slots)


@pytest.mark.parametrize(("num_slots", "min_actor_ranks"), [(2, 3), (1, 2), (0, 1), (0, 0), (-1, 1)])
def test_too_few_actor_ranks(num_slots, min_actor_ranks):
    with pytest.raises(ConfigError, match=rf"cluster\.min_actor_ranks={min_actor_ranks}: .*add nodes or lower it"):
        shrink(_placed("0-2", "0", "0"), num_slots, min_actor_ranks)


def test_enough_slots_but_few_of_them_actors():
    with pytest.raises(ConfigError, match="the 2 remaining slots of 4 hold 1 actor ranks"):
        shrink(_placed("1-3", "0", "0"), 2, 2)
