"""Custom rewards: ``score``, 1 for the right number and 0.1 if the response is nothing but the answer; ``brevity``.

bash run_main_math.sh reward.reward_type=custom reward.path=docs/examples/my_reward.py:score
"""

from __future__ import annotations

import re

_LAST_NUMBER = re.compile(r"-?\d+(?=\D*$)")


def score(response: str, answer: str, finished: bool) -> dict[str, float | bool]:
    """Grade a response. A response that was truncated at ``max_new_tokens`` is never correct."""
    number = _LAST_NUMBER.search(response)
    correct = finished and number is not None and number[0] == answer
    return {"reward": correct + 0.1 * (response.strip() == answer), "correct": correct}


def brevity(response: str) -> float:
    """1 for an empty response, 0 from 200 characters on."""
    return max(0.0, 1.0 - len(response) / 200)
