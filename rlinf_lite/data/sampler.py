"""The endless stream of prompts, addressed by index: their order is a pure function of (seed, epoch, index).

Nothing here changes during a run, so a checkpoint only saves one cursor: how many prompts were used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlinf_lite.counters import permutation
from rlinf_lite.types import Problem, Prompt

_EPOCHS_KEPT = 2
"""A batch that crosses an epoch boundary needs two orders."""


class PromptStream:
    """Prompt index ``i`` lies in epoch ``i // n`` of ``n`` problems; every epoch visits each problem once."""

    def __init__(self, problems: Sequence[Problem], *, seed: int, shuffle: bool) -> None:
        """
        Raises:
            ValueError: there are no problems.
        """
        if not problems:
            raise ValueError("a stream of prompts needs at least one problem")
        self._problems = problems
        self._seed = seed
        self._shuffle = shuffle
        self._orders: dict[int, np.ndarray] = {}

    def epoch_of(self, cursor: int) -> int:
        """The epoch of the prompt at ``cursor``, which is also the number of epochs completed before it."""
        assert cursor >= 0, cursor
        return cursor // len(self._problems)

    def prompt_at(self, prompt_index: int) -> Prompt:
        """The prompt with this index."""
        epoch = self.epoch_of(prompt_index)
        problem_id = int(self._order(epoch)[prompt_index % len(self._problems)])
        return Prompt(prompt_index=prompt_index, epoch=epoch, problem=self._problems[problem_id])

    def batch(self, cursor: int, num_prompts: int) -> tuple[Prompt, ...]:
        """``num_prompts`` prompts from ``cursor`` on, across epoch boundaries; none is dropped or repeated."""
        return tuple(self.prompt_at(index) for index in range(cursor, cursor + num_prompts))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) >= _EPOCHS_KEPT:
                del self._orders[next(iter(self._orders))]
            num_problems = len(self._problems)
            order = permutation(num_problems, "order", self._seed, epoch) if self._shuffle else np.arange(num_problems)
            self._orders[epoch] = order
        return self._orders[epoch]
