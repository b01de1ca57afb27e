"""What a grader is, and which ones the config can name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Protocol

from rlinf_lite.config import ConfigError, RewardConfig
from rlinf_lite.rewards.custom import CustomGrader
from rlinf_lite.rewards.exact import ExactGrader
from rlinf_lite.rewards.math_grader import MathGrader
from rlinf_lite.rewards.reasoning_gym import ReasoningGymGrader, require_installed
from rlinf_lite.rewards.user_function import UserFunction, find, search_path
from rlinf_lite.types import GradingItem, Score


class Grader(Protocol):
    """Scores responses. The same texts get the same scores, whatever was graded before and by whichever thread."""

    def score(self, items: Sequence[GradingItem]) -> list[Score]:
        """One `Score` a response, in order."""
        ...

    def close(self) -> None:
        """Give back processes. May be called again; a grader that is used after it starts anew."""
        ...


GRADERS: dict[str, Callable[[RewardConfig, Sequence[str]], Grader]] = {
    "custom": lambda config, search: CustomGrader(_function(config, search), config.reward_scale),
    "exact": lambda config, _: ExactGrader(config.reward_scale),
    "math": lambda config, _: MathGrader(config.reward_scale, config.verifier_timeout, config.answer_format),
    "reasoning_gym": lambda config, _: ReasoningGymGrader(config.reward_scale, config.verifier_timeout),
}


def build_grader(config: RewardConfig, search: Sequence[str] | None = None) -> Grader:
    """The grader of ``config.reward_type``.

    Args:
        search: where a user's function is looked for, as `search_path` of the driver says; None: of this process.

    Raises:
        ConfigError: an unknown type, or a user's function that cannot be used.
    """
    if config.reward_type not in GRADERS:
        known = ", ".join(sorted(GRADERS))
        raise ConfigError(f"reward.reward_type: {config.reward_type!r} is unknown; use one of {known}")
    return GRADERS[config.reward_type](config, search_path() if search is None else search)


def fingerprint(config: RewardConfig) -> str | None:
    """What beside the config and our own version decides over rewards; None: nothing does.

    Raises:
        ConfigError: a user's function cannot be found or called, or a package is missing.
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
