"""The few collectives that a save or load needs; without a process group they work for a single rank."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from rlinf_lite.checkpoint.errors import RankSilent
from rlinf_lite.node.exchange import NodeExchange

T = TypeVar("T")

_NEAR_BYTES = 64 << 10
"""The most of one rank that goes through shared memory."""


class Ranks:
    """All ranks of a process group. An error on one rank is sent to all of them, so no rank waits for a failed one.

    No rank waits for ever either: after the timeout `RankSilent` names the missing ranks as far as they are known.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout_seconds: float = 1800.0) -> None:
        self.group = group
        self.timeout = timedelta(seconds=timeout_seconds)
        self.distributed = dist.is_initialized()
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.size = dist.get_world_size(group) if self.distributed else 1
        self._exchange: NodeExchange | None = None

    @classmethod
    def of_all(cls, timeout_seconds: float, *, near: bool = False) -> Ranks:
        """All ranks, in a gloo group of their own, so that no other collective interferes. Collective.

        Args:
            near: on one machine they use shared memory for what is small.
        """
        timeout = timedelta(seconds=timeout_seconds)
        group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        ranks = cls(group, timeout_seconds)
        if near and group is not None and ranks.size > 1:
            ranks._exchange = NodeExchange.open(group, _NEAR_BYTES, timeout_seconds)
        return ranks

    def gather(self, value: T) -> list[T]:
        """Gather the value of every rank, in rank order, on all ranks.

        Raises:
            RankSilent: a rank is gone, or did not answer within the timeout.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            if self._exchange is not None and (shown := self._exchange.show_object(value)) is not None:
                return shown
            dist.monitored_barrier(
                self.group, timeout=self.timeout, wait_all_ranks=True
            )  # its error names the missing ranks
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RankSilent(f"rank {self.rank} got no answer from the others: {reason}") from None
        return values

    def collect(self, act: Callable[[], T]) -> list[T]:
        """Run ``act`` on each rank; if it failed on any, raise the lowest failing rank's error on all of them.

        Returns:
            The result of every rank, in rank order.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = act()
        except Exception as error:  # of any kind: the other ranks must not wait for this one
            failure = _portable(error)
        answers = self.gather((result, failure))
        for rank, (_, raised) in enumerate(answers):
            if raised is not None:
                raised.add_note(f"on rank {rank}")
                raise raised
        return [value for value, _ in answers]  # type: ignore[misc]

    def together(self, act: Callable[[], T]) -> T:
        """As `collect`, but return this rank's own result; results are not sent."""
        results: list[T] = []
        self.collect(lambda: results.append(act()))
        return results[0]

    def first(self, act: Callable[[], T]) -> T:
        """Run ``act`` on rank 0 only; all ranks get its result or its error."""
        return self.collect(lambda: act() if self.rank == 0 else None)[0]  # type: ignore[return-value]


def _portable(error: Exception) -> Exception:
    """The error itself, or one with the same text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
