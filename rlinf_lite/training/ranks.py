"""Which rank computes which micro-batch. Decided by the driver, so that each rank is sent only what it computes."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.types import MicroBatch, MiniBatch, RankBatch


def shard(micro_batches: Sequence[MicroBatch], num_ranks: int) -> list[tuple[MicroBatch | None, ...]]:
    """Assign micro-batches to ranks: rank r computes every ``num_ranks``-th one, beginning with the r-th.

    Returns:
        For each rank its micro-batches in their order, padded with None to the length of rank 0.
    """
    rounds = range(0, len(micro_batches), num_ranks)
    padded = [*micro_batches, *[None] * (num_ranks * len(rounds) - len(micro_batches))]
    return [tuple(padded[first + rank] for first in rounds) for rank in range(num_ranks)]


def shard_mini_batch(batch: MiniBatch, num_ranks: int) -> list[RankBatch]:
    """Assign the micro-batches of ``batch`` to ranks, as `shard` does; every rank gets the normalisers of the whole."""
    return [
        RankBatch(micro_batches=micro_batches, num_tokens=batch.num_tokens, num_sequences=batch.num_sequences)
        for micro_batches in shard(batch.micro_batches, num_ranks)
    ]
