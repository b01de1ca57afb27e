"""The interface of trainers: one rank of a sharded model and its optimizer. A policy and a critic are two of them.

A trainer knows no algorithm: it is given the loss. Who calls when: for each mini-batch `forward_backward`, then
`optim_step`; `forward` before that, where an algorithm needs log-probs or values of the model as it is; between two
steps `state` for a checkpoint and `weights` for the rollout engines. Where a method does not say otherwise, it is
collective over the trainer's ranks, so every rank is given as many units; None where it only takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlinf_lite.algorithms import Loss
from rlinf_lite.types import RankBatch, TokenBatch
from rlinf_lite.weights.names import WeightNames
from rlinf_lite.weights.pieces import WeightPiece


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitStats:
    """What a loss reports about one unit, see `LossOutputs`."""

    shares: Mapping[str, float]
    token_sums: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """Result of one optimizer step."""

    grad_norm: float
    """Global L2 norm before clipping; not finite after an overflow."""
    skipped: bool
    """No step was taken, because the gradients overflowed with a gradient scaler."""


class Scorer(Protocol):
    """One rank of a frozen model, such as the reference of a KL term."""

    def forward(self, units: Sequence[TokenBatch | None]) -> dict[int, Tensor]:
        """As `Trainer.forward`."""


class Trainer(Protocol):
    """One rank of a model that is trained."""

    world_size: int
    """Ranks that compute different units."""
    names: WeightNames
    """Of the weights, as checkpoints of every backend but Megatron's and the engines know them."""

    @property
    def num_updates(self) -> Tensor:
        """int64 []: optimizer steps so far, with those that were skipped."""

    def forward(self, units: Sequence[TokenBatch | None]) -> dict[int, Tensor]:
        """Compute the log-prob of each loss token, or its value, without gradients.

        Returns:
            By `TokenBatch.index`: float32 [M] in CPU memory.
        """

    def forward_backward(self, batch: RankBatch, loss: Loss) -> dict[int, UnitStats]:
        """Compute the gradient of ``loss`` on a mini-batch. An earlier gradient is dropped.

        Returns:
            By `TokenBatch.index`.
        """

    def optim_step(self, lr: float) -> StepStats:
        """Change the parameters by the gradients, which are gone afterwards.

        Raises:
            NotFinite: the gradient is not finite, and there is no gradient scaler to skip the step.
        """

    def skip_step(self) -> None:
        """Count an optimizer step that is not taken, because its mini-batch has no loss tokens."""

    def check_finite(self) -> None:
        """Check parameters and optimizer state before they are saved. Not collective.

        Raises:
            NotFinite: names the tensor in this rank's shard with a NaN or an infinity.
        """

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's part of each gradient after `forward_backward`, by a name of the backend's own."""

    def drop_gradients(self) -> None:
        """Give up the gradients of `forward_backward`: no step follows."""

    def state(self) -> Any:
        """Return everything that training changes: live tensors (sharded ones as DTensors) and `Stateful` objects in
        nested dicts, or an object that writes files of its own layout.
        """

    def bad_state(self, *, weights_only: bool = False) -> str | None:
        """Return why a loaded state cannot come from training; None if it can. Not collective.

        Args:
            weights_only: look only at the model.
        """

    def weights(self, dtype: torch.dtype) -> Iterator[WeightPiece]:
        """Yield this rank's rows of every weight, cast to ``dtype``; no row comes from two ranks.

        Every rank must exhaust it: with tensor parallelism it is collective.
        """

    def whole_weights(self, dtype: torch.dtype) -> Iterator[WeightPiece]:
        """Yield every weight whole, one at a time, cast to ``dtype``: every rank must exhaust it."""

    def on_before_change(self, hook: Callable[[], None]) -> None:
        """Call ``hook`` right before each change of parameters and optimizer state."""
