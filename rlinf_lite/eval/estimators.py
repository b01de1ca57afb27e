"""Estimators over several responses to the same problem: pass@k and maj@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlinf_lite.rewards.plain_numbers import PlainNumber, parse_number


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """One response in a majority vote."""

    answer: str
    """The final answer that the response states; empty if it states none."""
    correct: bool


def reported_ks(num_samples: int) -> list[int]:
    """The values of ``k`` that are reported: 1, 2, 4 ... and ``num_samples``."""
    return [*(1 << power for power in range((num_samples - 1).bit_length())), num_samples]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that at least one of ``k`` responses, drawn without replacement, is correct.

    The unbiased estimator of Chen et al., "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374),
    section 2.1, in exact integers.
    """
    assert 0 <= num_correct <= num_samples and 1 <= k <= num_samples
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def maj_at_k(votes: Sequence[Vote], k: int) -> float:
    """How often the majority of ``k`` responses is right: the mean over full consecutive blocks of ``k``."""
    blocks = [votes[first : first + k] for first in range(0, len(votes) - k + 1, k)]
    return sum(map(majority_is_correct, blocks)) / len(blocks)


def majority_is_correct(votes: Sequence[Vote]) -> bool:
    """Whether the answer that most responses state is right ("self-consistency", Wang et al., arXiv 2203.11171).

    Two spellings of a plain number are one answer (``1,000`` and ``1000.0``); other texts must be equal. Responses that
    state no answer do not vote. On a tie the answer that came first wins. An answer is right if the grader found any
    response that states it correct.
    """
    groups: dict[str | PlainNumber, list[bool]] = {}
    for vote in votes:
        if vote.answer:
            groups.setdefault(parse_number(vote.answer) or vote.answer, []).append(vote.correct)
    if not groups:
        return False
    most: list[bool] = max(groups.values(), key=len)
    return any(most)
