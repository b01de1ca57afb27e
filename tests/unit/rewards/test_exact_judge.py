"""Reward type ``exact``, and how judges are named."""

import subprocess
import sys

import pytest

from rlinf_lite.rewards import build_judge
from rlinf_lite.types import Score

RIGHT, WRONG = Score(reward=1.0, correct=True), Score(reward=0.0, correct=False)


def test_exact_wants_the_text_and_an_end():
    judge = build_judge("exact", 1.0, 30.0)
    responses = ["95", " 95\n", "95.0", "95", "", "9 5"]
    finished = [True, True, True, False, True, True]
    assert judge.score(responses, ["95"] * 6, finished) == [RIGHT, RIGHT, WRONG, WRONG, WRONG, WRONG]
    judge.close()


def test_reward_scale():
    judge = build_judge("exact", 2.5, 30.0)
    assert [score.reward for score in judge.score(["1", "2"], ["1", "1"], [True, True])] == [2.5, 0.0]


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(ValueError):
        build_judge("exact", 1.0, 30.0).score(["1", "2"], ["1"], [True, True])


def test_unknown_type_names_key_value_and_choices():
    with pytest.raises(ValueError, match=r"reward\.reward_type: 'maths' .*exact, math"):
        build_judge("maths", 1.0, 30.0)


def test_importing_and_building_loads_nothing_heavy():
    code = (
        "import sys; from rlinf_lite.rewards import build_judge; "
        "judge = build_judge('math', 1.0, 5.0); judge.score(['72'], ['#### 72'], [True]); "
        "print([m for m in ('torch', 'ray', 'math_verify', 'sympy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
