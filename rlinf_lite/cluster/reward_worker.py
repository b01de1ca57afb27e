"""The remote grader. Its own module, because a process that only reads text need not import torch."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite import faults
from rlinf_lite.config import RewardConfig
from rlinf_lite.rewards import build_grader
from rlinf_lite.types import GradingItem, Score


class RewardWorker:
    """One grader."""

    def __init__(self, rank: int, world_size: int, config: RewardConfig, search: Sequence[str]) -> None:
        """
        Args:
            search: where the driver looks for a user's function.
        """
        self.rank = rank
        self.grader = build_grader(config, search)

    def score(self, items: Sequence[GradingItem]) -> list[Score]:
        faults.reach("reward.score", step=0, rank=self.rank)  # of which step, nobody tells a grader
        return self.grader.score(items)
