"""The interface of rollout engines. There are two, the builtin one and vLLM.

Who calls when: a rollout worker builds one engine; at the top of each step (and before a validation) the actor's
weights are loaded into it; then it generates one batch at a time, in whatever order the driver sends them.

The contract that exactness rests on: what `generate` returns depends on the loaded weights and the batch alone. It
does not depend on earlier batches, on the worker, on the clock, or on RNG state that was seeded at start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import Tensor

from rlinf_lite.types import GenerationBatch, Group
from rlinf_lite.weights.pieces import WeightPiece


class RolloutEngine(Protocol):
    """Generates responses with the weights it was last given."""

    def load_weights(self, weights: Iterable[WeightPiece]) -> None:
        """Replace the weights in place.

        Args:
            weights: together they cover every parameter and persistent buffer; a tensor may come in several pieces,
                from several ranks.

        Raises:
            KeyError: a name that the model does not have.
        """

    def held_weights(self) -> Iterator[tuple[str, Tensor]] | None:
        """Every weight that it computes with, whole, under the name that `load_weights` takes.

        None if it keeps them in a form that cannot be compared with what was loaded.
        """

    def generate(self, batch: GenerationBatch) -> list[Group]:
        """Generate ``group_size`` responses per prompt, in the order of ``batch.prompts``.

        A response that could not be generated is included, with the reason in its ``error``.

        Raises:
            NotFinite: the weights give logits that are not finite.
        """

    def sleep(self) -> None:
        """Free GPU memory until the next `load_weights` (with ``rollout.enable_sleep``)."""

    def close(self) -> None:
        """Free memory and end processes."""
