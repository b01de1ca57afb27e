"""The remote side of `RewardWorkers`: one grader. Imports no torch, so it starts sooner."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite import faults
from rlinf_lite.cluster.workers.wire import Columns
from rlinf_lite.config import RewardConfig
from rlinf_lite.rewards import build_grader
from rlinf_lite.types import GradingItem, Score


class RewardWorker:
    """One grader."""

    def __init__(self, rank: int, num_ranks: int, config: RewardConfig, search: Sequence[str]) -> None:
        """
        Args:
            search: directories in which the driver looks for a user's reward function.
        """
        self.rank = rank
        self.grader = build_grader(config, search)

    def score(self, items: Sequence[GradingItem]) -> list[Score]:
        """Grade responses, in their order."""
        faults.reach("reward.score", step=0, rank=self.rank)  # a grader does not know the step
        return Columns(self.grader.score(items))
