"""How tests write down what a judge is given."""

from collections.abc import Callable

import pytest

from rlinf_lite.types import Attempt


@pytest.fixture(scope="session")
def attempts() -> Callable[..., list[Attempt]]:
    """``attempts(("response", "answer"), ("cut response", "answer", False))``."""

    def make(*rows: tuple) -> list[Attempt]:
        return [
            Attempt(prompt="?", response=response, answer=answer, finished=not finished or finished[0])
            for response, answer, *finished in rows
        ]

    return make
