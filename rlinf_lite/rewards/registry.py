"""The interface of graders, and the registry of graders by ``reward.reward_type``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Protocol

from rlinf_lite.config import ConfigError, RewardConfig
from rlinf_lite.rewards.custom import CustomGrader
from rlinf_lite.rewards.exact import ExactGrader
from rlinf_lite.rewards.math_grader import MathGrader
from rlinf_lite.rewards.reasoning_gym import ReasoningGymGrader, require_installed
from rlinf_lite.rewards.user_function import UserFunction, find
from rlinf_lite.types import GradingItem, Score
from rlinf_lite.user_code import search_path


class Grader(Protocol):
    """Scores responses. Equal items get equal scores, whatever was graded before and by which thread."""

    def score(self, items: Sequence[GradingItem]) -> list[Score]:
        """One `Score` per response, in order."""
        ...

    def close(self) -> None:
        """Stop child processes. May be called again; using the grader afterwards starts them again."""
        ...


GRADERS: dict[str, Callable[[RewardConfig, Sequence[str]], Grader]] = {
    "custom": lambda config, search: CustomGrader(_function(config, search), config.reward_scale),
    "exact": lambda config, _: ExactGrader(config.reward_scale),
    "math": lambda config, _: MathGrader(config.reward_scale, config.verifier_timeout, config.answer_format),
    "reasoning_gym": lambda config, _: ReasoningGymGrader(config.reward_scale, config.verifier_timeout),
}


def build_grader(config: RewardConfig, search: Sequence[str] | None = None) -> Grader:
    """Make the grader that ``config.reward_type`` names.

    Args:
        search: where to look for the user's function: `search_path` of the driver. None: that of this process.

    Raises:
        ConfigError: the user's function cannot be used.
    """
    return GRADERS[config.reward_type](config, search_path() if search is None else search)


def fingerprint(config: RewardConfig) -> str | None:
    """Identifies code outside this project that computes rewards: a user's function, or reasoning-gym.

    None if there is no such code.

    Raises:
        ConfigError: a user's function cannot be found or called, or reasoning-gym is not installed.
    """
    if config.reward_type == "custom":
        return _function(config, search_path()).fingerprint
    if config.reward_type == "reasoning_gym":
        require_installed()
        return f"reasoning-gym {version('reasoning-gym')}"
    return None


def _function(config: RewardConfig, search: Sequence[str]) -> UserFunction:
    if config.path is None:
        raise ConfigError("reward.path: no function given; reward.reward_type=custom needs my_pkg.my_reward:score")
    return find(config.path, search)
