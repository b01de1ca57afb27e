"""The registry of graders by ``reward.reward_type``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from rlinf_lite.config import ConfigError, RewardConfig, RewardFunctionConfig
from rlinf_lite.rewards.custom import CustomGrader
from rlinf_lite.rewards.exact import ExactGrader
from rlinf_lite.rewards.grader import Grader, SumGrader, WeightedGrader
from rlinf_lite.rewards.math_grader import MathGrader
from rlinf_lite.rewards.reasoning_gym import ReasoningGymGrader, require_installed
from rlinf_lite.rewards.user_function import UserFunction, find
from rlinf_lite.user_code import search_path


@dataclass(frozen=True, kw_only=True, slots=True)
class _Function:
    """One of the functions that a config names."""

    key: str
    """Of its section: ``"reward"``, ``"reward.functions.0"``."""
    config: RewardFunctionConfig
    verifier_timeout: float
    search: Sequence[str]

    def imported(self) -> UserFunction:
        """The user's function.

        Raises:
            ConfigError: it cannot be used.
        """
        key, path = f"{self.key}.path", self.config.path
        if path is None:
            raise ConfigError(f"{key}: no function given; {self.key}.reward_type=custom needs my_pkg.my_reward:score")
        return find(key, path, self.search)


GRADERS: dict[str, Callable[[_Function], Grader]] = {
    "custom": lambda function: CustomGrader(function.imported()),
    "exact": lambda _: ExactGrader(),
    "math": lambda function: MathGrader(function.verifier_timeout, function.config.answer_format),
    "reasoning_gym": lambda function: ReasoningGymGrader(function.verifier_timeout),
}


def build_grader(config: RewardConfig, search: Sequence[str] | None = None) -> Grader:
    """Make the grader that ``config.functions``, or else ``config.reward_type``, names.

    Args:
        search: where to look for the user's functions: `search_path` of the driver. None: that of this process.

    Raises:
        ConfigError: a user's function cannot be used.
    """
    summands = [
        WeightedGrader(
            name=function.config.name,
            weight=function.config.weight,
            grader=GRADERS[function.config.reward_type](function),
        )
        for function in _functions(config, search_path() if search is None else search)
    ]
    return SumGrader(summands, config.reward_scale)


def fingerprint(config: RewardConfig) -> str | None:
    """Identifies code outside this project that computes rewards: users' functions, and reasoning-gym.

    None if there is no such code.

    Raises:
        ConfigError: a user's function cannot be found or called, or reasoning-gym is not installed.
    """
    found, problems = [], []
    for function in _functions(config, search_path()):
        try:
            found.append(_fingerprint(function))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return " | ".join(filter(None, found)) or None


def _functions(config: RewardConfig, search: Sequence[str]) -> list[_Function]:
    return [
        _Function(key=key, config=function, verifier_timeout=config.verifier_timeout, search=search)
        for key, function in config.by_key().items()
    ]


def _fingerprint(function: _Function) -> str | None:
    if function.config.reward_type == "custom":
        return function.imported().fingerprint
    if function.config.reward_type == "reasoning_gym":
        require_installed()
        return f"reasoning-gym {version('reasoning-gym')}"
    return None
