"""Which rank computes which unit. Decided by the driver, so that each rank is sent only what it computes."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.types import MiniBatch, RankBatch, TokenBatch


def shard(units: Sequence[TokenBatch], num_ranks: int) -> list[tuple[TokenBatch | None, ...]]:
    """Assign units to ranks: rank r computes every ``num_ranks``-th one, beginning with the r-th.

    Returns:
        For each rank its units in their order, padded with None to the length of rank 0.
    """
    rounds = range(0, len(units), num_ranks)
    padded = [*units, *[None] * (num_ranks * len(rounds) - len(units))]
    return [tuple(padded[first + rank] for first in rounds) for rank in range(num_ranks)]


def shard_mini_batch(batch: MiniBatch, num_ranks: int) -> list[RankBatch]:
    """Assign the units of ``batch`` to ranks, as `shard` does; every rank gets the normalizers of the whole."""
    return [RankBatch(units=units, norm=batch.norm) for units in shard(batch.units, num_ranks)]
