"""The ``reward`` section: how responses are graded."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from rlinf_lite.config.fields import Fraction, Neutral, PathText, Seconds, Section, unsupported


class RewardConfig(Section):
    group_name: Neutral[str] = "RewardGroup"
    """Name of the reward workers in logs."""
    use_reward_model: Annotated[bool, unsupported("is not implemented; rewards are computed from rules")] = False
    """Not implemented; must be false."""
    reward_type: Literal["math", "exact", "custom", "reasoning_gym"] = "math"
    """``math``: plain numbers exactly, everything else by math-verify; ``exact``: the text itself, ended by EOS;
    ``custom``: the function ``path``; ``reasoning_gym``: the task that made the problem."""
    path: Neutral[PathText | None] = None
    """``custom`` only: ``my_pkg.my_reward:score`` or ``path/to/my_reward.py:score``, a function of any of ``prompt``,
    ``response``, ``answer``, ``finished`` and ``metadata`` that returns a number."""
    reward_scale: Annotated[float, Gt(0), Le(1e6)] = 1.0
    """Reward of a correct answer; a wrong one gets 0. A function's or task's score is multiplied by it."""
    answer_format: Literal["auto", "boxed", "hashes", "last_number"] = "auto"
    """``math`` only: where a response states its answer. ``auto``: the last of a box, ``<answer>`` tags, ``####`` and
    "the answer is", else the last expression; ``boxed``, ``hashes``, ``last_number``: only that."""
    verifier_timeout: Annotated[Seconds, Ge(0.1)] = 30.0
    """Seconds of CPU time (not of the clock: a busy machine must not change a reward) after which one check by
    math-verify or reasoning-gym is given up; the response then counts as wrong."""
    max_failed_fraction: Neutral[Fraction] = 0.5
    """Fraction of the responses of a step or validation that may fail to be generated or graded; they are left out of
    the step. If more fail, the run stops with the first error; 1: it never stops for that."""
