"""Reward type ``reasoning_gym``: the task that generated a problem scores the answer, in the verifier's process."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec

from rlinf_lite.errors import ConfigError
from rlinf_lite.rewards.outcome import ungraded
from rlinf_lite.rewards.verifier import Verifier, VerifierError, VerifierLost
from rlinf_lite.types import GradingItem, Score

SUBJECT = "reasoning-gym"
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class ReasoningGymGrader:
    """The task's own scores, from 0 to 1; only 1 counts as correct."""

    def __init__(self, verifier_timeout: float) -> None:
        """
        Args:
            verifier_timeout: CPU seconds per response.

        Raises:
            ConfigError: reasoning-gym is not installed.
        """
        require_installed()
        self._verifier = Verifier(verifier_timeout, SUBJECT)

    def score(self, items: Sequence[GradingItem]) -> list[Score]:
        return [self._grade(item) for item in items]

    def close(self) -> None:
        self._verifier.close()

    def _grade(self, item: GradingItem) -> Score:
        try:
            reply = self._verifier.ask({**item.metadata, "answers": stated_answers(item.response)})
        except VerifierError as error:
            return Score(reward=0.0, correct=False, error=str(error))
        except VerifierLost as error:
            return ungraded(str(error))
        return Score(reward=float(reply["reward"]), correct=reply["reward"] >= 1.0)


def stated_answers(response: str) -> list[str]:
    """The possible answers of a response: the content of its last ``<answer>...</answer>`` if there is one.

    Otherwise the whole response (an answer may be a grid of several lines), and its last line.
    """
    if tagged := _TAG.findall(response):
        return [tagged[-1].strip()]
    whole = response.strip()
    return list(dict.fromkeys([whole, whole.rpartition("\n")[2].strip()]))


def require_installed() -> None:
    """Check that reasoning-gym can be imported.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("reasoning_gym") is None:
        raise ConfigError(
            "data.type=reasoning_gym: the package reasoning-gym is not installed; pip install reasoning-gym"
        )
