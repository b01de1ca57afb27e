"""Reward type ``custom``: a function of the user's, found by `user_function`, asked for one response at a time."""

from __future__ import annotations

import math
import traceback
from asyncio import CancelledError
from collections.abc import Mapping, Sequence
from copy import deepcopy
from numbers import Complex, Real
from typing import Any, SupportsFloat

from rlinf_lite.rewards.outcome import ungraded
from rlinf_lite.rewards.user_function import UserFunction
from rlinf_lite.types import GradingItem, Score

_RETURNS = "return a number, a bool, or {'reward': number, 'correct': bool}"


class CustomGrader:
    """Asks ``function`` for each response. Where it raises, or returns no finite number, the response is not graded."""

    def __init__(self, function: UserFunction, reward_scale: float) -> None:
        """
        Raises:
            ConfigError: the function is a class, and making one of it fails.
        """
        self._call, self._names, self._scale = function.ready(), function.parameters, reward_scale

    def score(self, items: Sequence[GradingItem]) -> list[Score]:
        return [self._grade(item) for item in items]

    def close(self) -> None:
        """Nothing to give back."""

    def _grade(self, item: GradingItem) -> Score:
        try:
            return self._read(self._call(**{name: _offer(item, name) for name in self._names}))
        except (
            Exception,
            SystemExit,
            CancelledError,
        ) as error:  # it is the user's code
            return ungraded(f"{type(error).__name__}: {_text(error)} ({_place(error)})")

    def _read(self, returned: Any) -> Score:
        reward = returned.get("reward") if isinstance(returned, Mapping) else returned
        if not isinstance(reward, SupportsFloat) or (isinstance(reward, Complex) and not isinstance(reward, Real)):
            return ungraded(f"reward.path: the function returned {returned!r:.100}; {_RETURNS}")
        value = float(reward)
        if not math.isfinite(self._scale * value):
            return ungraded(
                f"reward.path: the function returned {value}; a reward must be finite, reward_scale included"
            )
        correct = returned.get("correct") if isinstance(returned, Mapping) else None
        if isinstance(correct, str) or correct != correct:  # NaN is not even itself
            return ungraded(f"reward.path: the function returned {returned!r:.100}; {_RETURNS}")
        return Score(reward=self._scale * value, correct=value >= 1.0 if correct is None else bool(correct))


def _offer(item: GradingItem, name: str) -> Any:
    # Metadata are shared by the responses to one problem.
    return deepcopy(dict(item.metadata)) if name == "metadata" else getattr(item, name)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # it is the user's code
        return "(no text)"


def _place(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno}"
