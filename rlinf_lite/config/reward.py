"""The ``reward`` section: how responses are graded."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator

from rlinf_lite.config.fields import Fraction, Neutral, PathText, Seconds, Section, unsupported


def _metric_part(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise ValueError("its metric is reward/NAME; use a letter, then letters, digits, _ or -")
    return name


def _not_zero(weight: float) -> float:
    if weight == 0:
        raise ValueError("would not count; use another weight, or remove the function")
    return weight


RewardType = Literal["math", "exact", "custom", "reasoning_gym"]
AnswerFormat = Literal["auto", "boxed", "hashes", "last_number"]


class RewardFunctionConfig(Section):
    name: Annotated[str, AfterValidator(_metric_part)] = ""
    """Required, and not the name of another one: the mean of its scores is the metric ``reward/NAME``."""
    reward_type: RewardType = "math"
    """As ``reward.reward_type``."""
    path: Neutral[PathText | None] = None
    """As ``reward.path``."""
    answer_format: AnswerFormat = "auto"
    """As ``reward.answer_format``."""
    weight: Annotated[float, Ge(-1e6), Le(1e6), AfterValidator(_not_zero)] = 1.0
    """Factor on its scores in the sum; negative: a penalty."""


class RewardConfig(Section):
    group_name: Neutral[str] = "RewardGroup"
    """Name of the reward workers in logs."""
    use_reward_model: Annotated[bool, unsupported("is not implemented; rewards are computed from rules")] = False
    """Not implemented; must be false."""
    reward_type: RewardType = "math"
    """``math``: plain numbers exactly, everything else by math-verify; ``exact``: the text itself, ended by EOS;
    ``custom``: the function ``path``; ``reasoning_gym``: the task that made the problem."""
    path: Neutral[PathText | None] = None
    """``custom`` only: ``my_pkg.my_reward:score`` or ``path/to/my_reward.py:score``, a function of any of ``prompt``,
    ``response``, ``answer``, ``finished`` and ``metadata`` that returns a number."""
    reward_scale: Annotated[float, Gt(0), Le(1e6)] = 1.0
    """Reward of a correct answer; a wrong one gets 0. A function's or task's score is multiplied by it."""
    answer_format: AnswerFormat = "auto"
    """``math`` only: where a response states its answer. ``auto``: the last of a box, ``<answer>`` tags, ``####`` and
    "the answer is", else the last expression; ``boxed``, ``hashes``, ``last_number``: only that."""
    functions: list[RewardFunctionConfig] = []
    """Several functions in place of ``reward_type``, ``path`` and ``answer_format``. The reward is ``reward_scale``
    times the sum of weight times score, and the first function decides which responses are correct."""
    verifier_timeout: Annotated[Seconds, Ge(0.1)] = 30.0
    """Seconds of CPU time (not of the clock: a busy machine must not change a reward) after which one check by
    math-verify or reasoning-gym is given up; the response then counts as wrong."""
    max_failed_fraction: Neutral[Fraction] = 0.5
    """Fraction of the responses of a step or validation that may fail to be generated or graded; they are left out of
    the step. If more fail, the run stops with the first error; 1: it never stops for that."""

    def by_key(self) -> dict[str, RewardFunctionConfig]:
        """Every function that grades, by the key of its section: ``reward.functions.0`` and so on, or ``reward``.

        The single function of the section itself has no name, and the weight 1.
        """
        if self.functions:
            return {f"reward.functions.{index}": function for index, function in enumerate(self.functions)}
        single = RewardFunctionConfig.model_construct(
            reward_type=self.reward_type, path=self.path, answer_format=self.answer_format
        )
        return {"reward": single}
