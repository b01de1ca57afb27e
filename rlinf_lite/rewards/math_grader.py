"""Reward type ``math``: a response is correct if its final answer is equivalent to the reference answer.

Equal texts and plain numbers are compared in microseconds. Lists, units, words and other structure are compared in this
process too; expressions are compared by math-verify's parser and sympy in a child process.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from rlinf_lite.rewards.equivalence import same_answer
from rlinf_lite.rewards.extraction import final_answer, reference_answer
from rlinf_lite.rewards.outcome import ungraded
from rlinf_lite.rewards.plain_numbers import MAX_CHARS, parse_number, same_number
from rlinf_lite.rewards.verifier import Verifier, VerifierError, VerifierLost
from rlinf_lite.types import GradingItem, Score


class MathGrader:
    """Compares final answers. An answer in a truncated response counts.

    Args:
        verifier_timeout: CPU seconds per check by math-verify.
        answer_format: where a response states its answer; see `final_answer`.

    Raises:
        ImportError: math-verify is not installed. Checked here, so that a run fails at start.
    """

    def __init__(self, verifier_timeout: float, answer_format: str = "auto") -> None:
        if find_spec("math_verify") is None:
            raise ImportError("reward.reward_type: 'math' needs math-verify; pip install math-verify, or use 'exact'")
        self._answer_format = answer_format
        self._verifier = Verifier(verifier_timeout)

    def score(self, items: Sequence[GradingItem]) -> list[Score]:
        return [self._grade(item.response, item.answer) for item in items]

    def close(self) -> None:
        self._verifier.close()

    def _grade(self, response: str, answer: str) -> Score:
        try:
            correct = self._is_correct(final_answer(response, self._answer_format), reference_answer(answer))
        except VerifierError as error:
            return Score(reward=0.0, correct=False, error=str(error))
        except VerifierLost as error:
            return ungraded(str(error))
        return Score(reward=float(correct), correct=correct)

    def _is_correct(self, found: str, reference: str) -> bool:
        if not found or not reference:
            return False
        if found == reference:
            return True
        if max(len(found), len(reference)) > MAX_CHARS:
            raise VerifierError(f"an answer of {len(found)} characters (reference {len(reference)}) is too long")
        number, expected = parse_number(found), parse_number(reference)
        if number is not None and expected is not None:
            return same_number(number, expected)
        return same_answer(reference, found, self._verifier.check)
