"""The reward workers as the driver calls them: responses in, scores out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from rlinf_lite.cluster.group import Call, WorkerGroup
from rlinf_lite.cluster.session import Session
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.work_queue import WorkQueue
from rlinf_lite.cluster.workers.wire import Columns
from rlinf_lite.config import RewardConfig
from rlinf_lite.rewards import search_path
from rlinf_lite.types import GradingItem, Score

Key = TypeVar("Key")


_ITEMS_PER_CALL = 64
_PLAIN_ITEMS_PER_CALL = 2048
"""Of graders that only compare texts: in the time of a call they grade thousands."""


class RewardWorkers(WorkerGroup):
    """All graders."""

    items_per_call: int
    """Responses that a grader is given at a time, at most."""

    def __init__(self, config: RewardConfig, session: Session, spares: Spares) -> None:
        """Start every process; does not wait until they are up."""
        is_plain = all(function.reward_type == "exact" for function in config.by_key().values())
        self.items_per_call = _PLAIN_ITEMS_PER_CALL if is_plain else _ITEMS_PER_CALL
        target = "rlinf_lite.cluster.workers.reward_worker:RewardWorker"
        super().__init__(config.group_name, "reward", target, session, spares, config, search_path())

    def start_score(self, rank: int, items: Sequence[GradingItem]) -> Call[list[Score]]:
        """Grade responses on one rank."""
        return self.start_one(rank, "score", Columns(items))

    def queue(self) -> WorkQueue[Key, Sequence[GradingItem], list[Score]]:
        """A queue of responses to grade, each part for whichever grader is free."""
        return WorkQueue(self, self.start_score)
