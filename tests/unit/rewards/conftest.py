"""Fixtures: grading items, and one math grader whose verifier process is shared by all tests of a session."""

from collections.abc import Callable, Iterator

import pytest

from rlinf_lite.rewards.math_grader import MathGrader
from rlinf_lite.types import GradingItem


@pytest.fixture(scope="session")
def items() -> Callable[..., list[GradingItem]]:
    """``items(("response", "answer"), ("truncated response", "answer", False))``."""

    def make(*rows: tuple) -> list[GradingItem]:
        return [
            GradingItem(prompt="?", response=response, answer=answer, finished=not finished or finished[0])
            for response, answer, *finished in rows
        ]

    return make


@pytest.fixture(scope="session")
def math_grader() -> Iterator[MathGrader]:
    """Starting a verifier process takes a second."""
    grader = MathGrader(30.0)
    yield grader
    grader.close()
