"""Which rank computes which unit. Decided by the driver, so that each rank is sent only what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from rlinf_lite.errors import ConfigError
from rlinf_lite.types import MiniBatch, RankBatch, Round, TokenBatch

T = TypeVar("T")


def data_parallel_size(num_ranks: int, tensor_parallel: int) -> int:
    """How many groups of ``tensor_parallel`` ranks compute different units.

    Raises:
        ConfigError: there is a part of a group.
    """
    if num_ranks % tensor_parallel:
        raise ConfigError(
            f"must divide the number of actor workers, which is {num_ranks}",
            key="actor.megatron.tensor_model_parallel_size",
            value=tensor_parallel,
            remedy="change it, or the actor's slots in cluster.component_placement",
        )
    return num_ranks // tensor_parallel


def for_each_rank(of_groups: Sequence[T], tensor_parallel: int) -> list[T]:
    """Give all tensor-parallel ranks of a group the same: rank = group * ``tensor_parallel`` + tensor-parallel rank."""
    return [of_group for of_group in of_groups for _ in range(tensor_parallel)]


def shard(units: Sequence[TokenBatch], num_ranks: int) -> list[tuple[TokenBatch | None, ...]]:
    """Assign units to ranks: the largest ``num_ranks`` of them first, one to each, then the next.

    Returns:
        For each rank its units, padded with None to the length of rank 0.
    """
    units = by_size(units)
    rounds = range(0, len(units), num_ranks)
    padded = [*units, *[None] * (num_ranks * len(rounds) - len(units))]
    return [tuple(padded[first + rank] for first in rounds) for rank in range(num_ranks)]


def by_size(units: Sequence[TokenBatch]) -> list[TokenBatch]:
    """Units from the one with the most tokens to that with the fewest.

    Ranks wait for each other after each unit, so those that are computed at the same time should take equally long.
    """
    return sorted(units, key=lambda unit: -len(unit.ids_N))


def slots(units: Sequence[TokenBatch], virtual_ranks: int) -> list[Sequence[TokenBatch]]:
    """Deal out units, the largest ones first, to at most ``virtual_ranks`` slots; their lengths differ by at most one.

    The number of ranks plays no part: the order of the slots is that in which their gradients are summed.
    """
    number, dealt = min(len(units), virtual_ranks), by_size(units)
    return [dealt[slot::number] for slot in range(number)]


def shard_mini_batch(batch: MiniBatch, num_ranks: int, *, virtual_ranks: int) -> list[RankBatch]:
    """Assign the units of ``batch`` to ranks, by slots; every rank gets the normalizers of the whole.

    A slot's gradients are added up on one rank, and those of slots in the slots' order, so the gradient depends on
    ``virtual_ranks``, and not on ``num_ranks``. In each round, ranks 0, 1, ... compute the next slots.
    """
    all_slots = slots(batch.units, virtual_ranks)
    of_ranks: list[list[Round]] = [[] for _ in range(num_ranks)]
    for first in range(0, len(all_slots), num_ranks):
        current = all_slots[first : first + num_ranks]
        length = max(map(len, current))
        for rank, rounds in enumerate(of_ranks):
            units = current[rank] if rank < len(current) else ()
            padded = (*units, *[None] * (length - len(units)))
            rounds.append(Round(units=padded, num_slots=len(current)))
    return [RankBatch(rounds=tuple(rounds), norm=batch.norm) for rounds in of_ranks]
