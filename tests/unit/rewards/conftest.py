"""How tests write down what a grader is given."""

from collections.abc import Callable

import pytest

from rlinf_lite.types import GradingItem


@pytest.fixture(scope="session")
def items() -> Callable[..., list[GradingItem]]:
    """``items(("response", "answer"), ("cut response", "answer", False))``."""

    def make(*rows: tuple) -> list[GradingItem]:
        return [
            GradingItem(prompt="?", response=response, answer=answer, finished=not finished or finished[0])
            for response, answer, *finished in rows
        ]

    return make
