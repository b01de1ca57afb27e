"""Reward type ``math``, from text to score, with math-verify."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from rlinf_lite.config import RewardConfig
from rlinf_lite.rewards import build_grader
from rlinf_lite.rewards.math_grader import MathGrader
from rlinf_lite.rewards.plain_numbers import MAX_CHARS
from rlinf_lite.types import GradingItem, Score


def item(response, answer, finished=True):
    return GradingItem(prompt="?", response=response, answer=answer, finished=finished)


def is_correct(grader, response, answer):
    (score,) = grader.score([item(response, answer)])
    assert score.error is None
    return score.correct


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        ("She makes $18 a day. The answer is $18.", "9 * 2 = $<<9*2=18>>18 every day.\n#### 18", True),
        ("She makes 9 * 2 = 17", "9 * 2 = $<<9*2=18>>18 every day.\n#### 18", False),
        ("#### 1450", "#### 1,450", True),
        (r"\boxed{0.75}", "3/4", True),
        (r"\boxed{70,000}", "#### 70000", True),
        (r"\boxed{7}", "72", False),
        ("", "72", False),
        ("", "", False),
        ("I do not know", "72", False),
        (r"\boxed{é}", "é", True),
    ],
)
def test_graded_without_a_verifier_process(response, answer, correct):
    grader = MathGrader(30.0)
    assert is_correct(grader, response, answer) is correct
    assert grader._verifier.pid is None


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{\frac{1}{2}}", "0.25", False),
        (r"\boxed{\frac{144}{2}}", "#### 72", True),
        (r"\boxed{72\text{ dollars}}", "#### 72", True),
        (r"\boxed{x = 5}", "$5$", True),
        (r"\boxed{2\sqrt{2}}", r"$\sqrt{8}$", True),
        (r"\boxed{(x-1)(x+1)}", r"so $\boxed{x^2-1}$", True),
        (r"\boxed{(x-1)(x+2)}", r"so $\boxed{x^2-1}$", False),
        (r"The answer is $\{2, 1\}$.", r"\{1, 2\}", True),
        (r"\boxed{(2,1)}", "(1,2)", False),
        (r"\boxed{-\pi}", "-\\pi", True),
        ("\\boxed{\u2212\\frac12}", "-0.5", True),
        (r"\boxed{\frac{1}{0}}", "3", False),
        (r"\boxed{😀}", "3", False),
        ("\\boxed{\ud800}", "3", False),
        (r"\boxed{a \\ } \undefined{", "3", False),
    ],
)
def test_graded_by_math_verify(math_grader, response, answer, correct):
    assert is_correct(math_grader, response, answer) is correct


def test_scale_order_and_truncated_responses():
    grader = build_grader(RewardConfig(reward_scale=3.0))
    scores = grader.score([item("The answer is 4", "4"), item("#### 5", "4"), item("#### 4", "4", False)])
    assert [score.reward for score in scores] == [3.0, 0.0, 3.0]


def test_a_huge_answer_is_wrong_and_a_huge_response_is_graded():
    grader = MathGrader(30.0)
    digits = "9" * (MAX_CHARS + 1)
    responses = [rf"\boxed{{{digits}}}", "5 " * 200_000 + r"\boxed{4}" + " so" * 200_000]
    scores = grader.score([item(response, "4") for response in responses])
    assert scores[0].correct is False and "2001 characters" in str(scores[0].error)
    assert scores[1] == Score(reward=1.0, correct=True)
    assert grader._verifier.pid is None


def test_several_threads_share_a_grader_and_agree_with_one_thread(math_grader):
    given = [item(rf"\boxed{{\frac{{{n}}}{{{2}}} + x}}", f"x + {n / 2 if n % 3 else n + 1}") for n in range(24)]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda one: math_grader.score([one])[0], given))
    assert [score.correct for score in threaded] == [bool(n % 3) for n in range(24)]
    assert threaded == math_grader.score(given)
