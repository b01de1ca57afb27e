"""A reward of one's own: the right number, and a little for writing nothing else.

bash run_main_math.sh reward.reward_type=custom reward.path=docs/examples/my_reward.py:score
"""

from __future__ import annotations

import re

_LAST_NUMBER = re.compile(r"-?\d+(?=\D*$)")


def score(response: str, answer: str, finished: bool) -> dict[str, float | bool]:
    """1 for the right number in a response that was not cut, and 0.1 for nothing beside it."""
    number = _LAST_NUMBER.search(response)
    correct = finished and number is not None and number[0] == answer
    return {"reward": correct + 0.1 * (response.strip() == answer), "correct": correct}
