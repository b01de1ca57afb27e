"""The remote judge. Its own module, because a process that only reads text need not import torch."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_lite.config import RewardConfig
from rlinf_lite.rewards import build_judge
from rlinf_lite.types import Score


class RewardWorker:
    """One judge."""

    def __init__(self, rank: int, world_size: int, config: RewardConfig) -> None:
        self.judge = build_judge(config.reward_type, config.reward_scale, config.verifier_timeout)

    def score(self, batch: tuple[Sequence[str], Sequence[str], Sequence[bool]]) -> list[Score]:
        """Judge (responses, answers, finished)."""
        return self.judge.score(*batch)
