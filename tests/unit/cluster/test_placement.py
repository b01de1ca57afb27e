"""component_placement: slots of each component."""

from __future__ import annotations

import pytest

from rlinf_lite.cluster.placement import parse
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


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"critic": 0}, "unknown component 'critic'"),
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
