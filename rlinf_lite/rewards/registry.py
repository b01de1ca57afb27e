"""What a judge is, and which ones the config can name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rlinf_lite.rewards.exact import ExactJudge
from rlinf_lite.rewards.math_judge import MathJudge
from rlinf_lite.types import Score


class Judge(Protocol):
    """Scores responses. The same texts get the same scores, whatever was judged before and by whichever thread."""

    def score(self, responses: Sequence[str], answers: Sequence[str], finished: Sequence[bool]) -> list[Score]:
        """One `Score` a response, in order.

        Args:
            responses: decoded responses, special tokens left out.
            answers: the reference of each response, as its data set states it.
            finished: whether the response ended by itself (True) or was cut.
        """
        ...

    def close(self) -> None:
        """Give back processes. May be called again; a judge that is used after it starts anew."""
        ...


JUDGES: dict[str, Callable[[float, float], Judge]] = {
    "exact": lambda scale, _timeout: ExactJudge(scale),
    "math": lambda scale, timeout: MathJudge(scale, timeout),
}


def build_judge(reward_type: str, reward_scale: float, verifier_timeout: float) -> Judge:
    """The judge of this type.

    Args:
        reward_type: a key of `JUDGES`.
        reward_scale: reward of a correct response; a wrong one gets 0.
        verifier_timeout: seconds of CPU time for one check that needs a symbolic verifier.

    Raises:
        ValueError: unknown ``reward_type``.
    """
    if reward_type not in JUDGES:
        raise ValueError(f"reward.reward_type: {reward_type!r} is unknown; use one of {', '.join(sorted(JUDGES))}")
    return JUDGES[reward_type](reward_scale, verifier_timeout)
