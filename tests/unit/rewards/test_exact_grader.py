"""Reward type ``exact``, and building graders by name."""

import subprocess
import sys

import pytest

from rlinf_lite.config import ConfigError, RewardConfig
from rlinf_lite.rewards import build_grader
from rlinf_lite.types import Score

RIGHT, WRONG = Score(reward=1.0, correct=True), Score(reward=0.0, correct=False)


def test_exact_needs_the_same_text_and_an_untruncated_response(items):
    grader = build_grader(RewardConfig(reward_type="exact"))
    rows = [("95", "95"), (" 95\n", "95"), ("95.0", "95"), ("95", "95", False), ("", "95"), ("9 5", "95")]
    assert grader.score(items(*rows)) == [RIGHT, RIGHT, WRONG, WRONG, WRONG, WRONG]
    grader.close()


def test_reward_scale(items):
    grader = build_grader(RewardConfig(reward_type="exact", reward_scale=2.5))
    assert [score.reward for score in grader.score(items(("1", "1"), ("2", "1")))] == [2.5, 0.0]


def test_an_unknown_type_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"reward\.reward_type: 'maths' .*custom, exact, math, reasoning_gym"):
        build_grader(RewardConfig(reward_type="maths"))


def test_building_a_grader_imports_nothing_heavy():
    code = (
        "import sys; from rlinf_lite.config import RewardConfig; from rlinf_lite.rewards import build_grader; "
        "from rlinf_lite.types import GradingItem; grader = build_grader(RewardConfig(reward_type='math')); "
        "grader.score([GradingItem(prompt='', response='72', answer='#### 72', finished=True)]); "
        "print([m for m in ('torch', 'ray', 'math_verify', 'sympy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
