"""What a rollout engine is. The builtin engine is one; vLLM fits behind the same page.

Who calls when: a rollout worker builds one engine; at the top of each step (and before a validation) the actor's
weights are loaded into it; then it generates chunks, one at a time, in whatever order the driver hands them out.

The contract that exactness rests on: what `generate` returns is a function of the loaded weights and of the chunk
alone. It does not depend on earlier chunks, on the worker, on the clock, or on a generator that was seeded at start.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from rlinf_lite.types import GenerationBatch, Rollout
from rlinf_lite.weights.pieces import WeightPiece


class RolloutEngine(Protocol):
    """Generates responses with the weights it was last given."""

    def load_weights(self, weights: Iterable[WeightPiece]) -> None:
        """Replace weights in place.

        Args:
            weights: together they cover every parameter and persistent buffer; a tensor may come in several pieces,
                from several ranks.

        Raises:
            KeyError: a name that the model does not have.
        """

    def generate(self, chunk: GenerationBatch) -> list[Rollout]:
        """``group_size`` responses for each prompt, ordered by prompt and then by sample index. One that could not be
        generated is there all the same, with the reason in its ``error``.

        Raises:
            NotFinite: the weights give logits that are not finite.
        """

    def sleep(self) -> None:
        """With ``rollout.enable_sleep``: give up GPU memory until the next `load_weights`."""

    def close(self) -> None:
        """Give up memory and processes."""
