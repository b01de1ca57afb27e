"""Reward type ``custom``: calls the user's reward function, which `user_function` finds, once per response."""

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
    """Calls ``function`` once per response. A response for which it fails, or returns no finite number, is ungraded."""

    def __init__(self, function: UserFunction) -> None:
        """
        Raises:
            ConfigError: the function is a class that cannot be instantiated.
        """
        self._function, self._call = function, function.ready()

    def score(self, items: Sequence[GradingItem]) -> list[Score]:
        return [self._grade(item) for item in items]

    def close(self) -> None:
        """Does nothing: there is nothing to release."""

    def _grade(self, item: GradingItem) -> Score:
        try:
            return self._score_of(self._call(**{name: _argument(item, name) for name in self._function.parameters}))
        except (Exception, SystemExit, CancelledError) as error:  # the user's code may raise anything
            return ungraded(f"{type(error).__name__}: {_text(error)} ({_location(error)})")

    def _score_of(self, returned: Any) -> Score:
        reward = returned.get("reward") if isinstance(returned, Mapping) else returned
        if not isinstance(reward, SupportsFloat) or (isinstance(reward, Complex) and not isinstance(reward, Real)):
            return self._refused(returned)
        value = float(reward)
        if not math.isfinite(value):
            return ungraded(f"{self._function.key}: the function returned {value}; a reward must be finite")
        correct = returned.get("correct") if isinstance(returned, Mapping) else None
        if isinstance(correct, str) or correct != correct:  # only NaN differs from itself
            return self._refused(returned)
        return Score(reward=value, correct=value >= 1.0 if correct is None else bool(correct))

    def _refused(self, returned: Any) -> Score:
        return ungraded(f"{self._function.key}: the function returned {returned!r:.100}; {_RETURNS}")


def _argument(item: GradingItem, name: str) -> Any:
    # Responses to the same problem share its metadata, so the function gets a copy.
    return deepcopy(dict(item.metadata)) if name == "metadata" else getattr(item, name)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # the user's exception may have a broken __str__
        return "(no text)"


def _location(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno}"
