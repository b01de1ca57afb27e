"""Reads ``cluster.component_placement`` as slots. Pure functions, without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlinf_lite.errors import ConfigError

COMPONENTS = ("actor", "critic", "rollout", "reward")
"""The critic is placed only if there is one."""
_KEY = "cluster.component_placement"


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The slots of each component, one worker per slot; an engine that spreads its layers over GPUs has several."""

    slots: dict[str, tuple[int, ...]]
    slots_per_engine: int = 1
    """Of a rollout worker: ``rollout.tensor_parallel_size`` on GPUs."""

    def workers(self, component: str) -> tuple[tuple[int, ...], ...]:
        """The slots of each worker of a component, in rank order. Its process belongs to the first of them."""
        slots, size = self.slots[component], self.slots_per_engine if component == "rollout" else 1
        return tuple(slots[first : first + size] for first in range(0, len(slots), size))

    @property
    def used(self) -> tuple[int, ...]:
        """All slots that any component uses, ascending."""
        return tuple(sorted({slot for slots in self.slots.values() for slot in slots}))

    def sharers(self, slot: int) -> int:
        """Count the components in ``slot`` that need its device; rewards need none."""
        return sum(slot in slots for name, slots in self.slots.items() if name != "reward")

    def collocated(self) -> bool:
        """Whether actor and rollout share a slot."""
        return bool(set(self.slots["actor"]) & set(self.slots["rollout"]))


def parse(
    component_placement: Mapping[str, Any],
    num_available: int,
    *,
    with_critic: bool = False,
    slots_per_engine: int = 1,
) -> Placement:
    """Read ``{"actor,rollout": "0-3", "reward": 0}``.

    Args:
        num_available: slots that ``all`` stands for.
        with_critic: whether there is one. Its slots are the actor's, unless it is placed.
        slots_per_engine: as in `Placement`.

    Raises:
        ConfigError: an unknown or missing component, one named twice, or slots that cannot be read or that do not
            divide into engines.
    """
    slots: dict[str, tuple[int, ...]] = {}
    for names, value in (component_placement or {"actor,rollout,reward": "0"}).items():
        for name in (part.strip() for part in str(names).split(",")):
            if name not in COMPONENTS:
                raise ConfigError(f"{_KEY}: unknown component {name!r}; the components are {', '.join(COMPONENTS)}")
            if name in slots:
                raise ConfigError(f"{_KEY}: {name} is placed twice; name it once")
            slots[name] = _slots(name, str(value), num_available)
    if "critic" in slots and not with_critic:
        raise ConfigError(
            f"{_KEY}: critic is placed, but there is none; set critic.use_critic_model=true, or remove it"
        )
    if with_critic and "actor" in slots:
        slots.setdefault("critic", slots["actor"])
    if missing := [name for name in COMPONENTS if name not in slots and name != "critic"]:
        raise ConfigError(f"{_KEY}: {missing[0]} has no slots; add for example {missing[0]}: 0")
    if len(slots["rollout"]) % slots_per_engine:
        raise ConfigError(
            f"{_KEY}: rollout has {len(slots['rollout'])} slots, and rollout.tensor_parallel_size={slots_per_engine} "
            "makes one engine of as many GPUs; give rollout a multiple of it"
        )
    return Placement(slots=slots, slots_per_engine=slots_per_engine)


def shrink(placement: Placement, num_slots: int, min_actor_ranks: int) -> Placement:
    """Place the same job on the first ``num_slots`` of its slots, for ``cluster.elastic``.

    Each component keeps those of its slots that remain, in their order, so actors lose ranks from the highest slot
    down. A component that would keep none moves to the remaining slots: its n-th slot to the n-th of them, modulo their
    number. Slots keep their numbers, and each remaining one is still used, so a placement group of ``num_slots``
    bundles fits. Always shrink the configured placement: ranks return when more slots are there again.

    Raises:
        ConfigError: fewer than ``min_actor_ranks`` actor ranks would remain.
    """
    used = placement.used
    if num_slots >= len(used):
        return placement
    assert placement.slots_per_engine == 1, "refused with cluster.elastic"
    kept = used[: max(num_slots, 0)]
    num_ranks = len(_remaining(placement.slots["actor"], used, kept))
    if num_ranks < max(min_actor_ranks, 1):
        raise ConfigError(
            f"cluster.min_actor_ranks={min_actor_ranks}: the {len(kept)} remaining slots of {len(used)} hold "
            f"{num_ranks} actor ranks; add nodes or lower it"
        )
    return Placement(slots={name: _remaining(old, used, kept) for name, old in placement.slots.items()})


def _remaining(old: tuple[int, ...], used: tuple[int, ...], kept: tuple[int, ...]) -> tuple[int, ...]:
    remaining = tuple(slot for slot in old if slot in kept)
    if remaining or not kept:
        return remaining
    return tuple(dict.fromkeys(kept[used.index(slot) % len(kept)] for slot in old))


def _slots(name: str, text: str, num_available: int) -> tuple[int, ...]:
    if text == "all":
        return tuple(range(num_available))
    found: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.strip().partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"{_KEY}: {name}: {text!r} is not a set of slots; write all, 0, 0-3 or 0,2")
    return tuple(found)
