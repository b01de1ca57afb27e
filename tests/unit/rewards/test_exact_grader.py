"""Reward type ``exact``, and building graders by name."""

import subprocess
import sys

from rlinf_lite.config import RewardConfig, keys
from rlinf_lite.rewards import build_grader
from rlinf_lite.rewards.registry import GRADERS
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


def test_each_type_of_the_config_has_a_grader():
    assert set(GRADERS) == set(keys()["reward.reward_type"].choices)


def test_building_a_grader_imports_nothing_heavy():
    code = (
        "import sys; from rlinf_lite.config import RewardConfig; from rlinf_lite.rewards import build_grader; "
        "from rlinf_lite.types import GradingItem; grader = build_grader(RewardConfig(reward_type='math')); "
        "grader.score([GradingItem(prompt='', response='72', answer='#### 72', finished=True)]); "
        "print([m for m in ('torch', 'ray', 'math_verify', 'sympy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
