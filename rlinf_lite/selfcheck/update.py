"""The trainer's half of the self-check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlinf_lite import rng
from rlinf_lite.algorithms import Loss, LossInputs, LossOutputs
from rlinf_lite.selfcheck.records import UpdateCheck
from rlinf_lite.selfcheck.twice import Twice
from rlinf_lite.training.batch import SplitSettings, StepBatch, StepRows
from rlinf_lite.training.trainer import Trainer
from rlinf_lite.types import Column, Group, MiniBatch, RankBatch, Round, TokenBatch
from rlinf_lite.weights.checksum import Checksums, checksums, first_difference
from rlinf_lite.weights.pieces import WeightPiece


def check_update(trainer: Trainer, loss: Loss, groups: Sequence[Group]) -> UpdateCheck:
    """Compute log-probs (or values) and the gradient of one unit twice. Collective: every rank gets the same.

    What training changes is afterwards as before: parameters, optimizer state, counters, RNG state, no gradients.
    """
    batch, unit = _unit(groups)
    values_M = trainer.forward([unit])[0].numpy()
    one, two = (_gradient(trainer, loss, _with_columns(batch, values_M)) for _ in range(2))
    difference = None
    if one.values_M.tobytes() != two.values_M.tobytes():
        difference = "a forward pass differs when computed again"
    elif (name := first_difference(one.checksums, two.checksums)) is not None:
        difference = f"the gradient of {name} differs when computed again"
    return UpdateCheck(values_M=values_M, difference=difference)


def update_operations(trainer: Trainer, loss: Loss, groups: Sequence[Group]) -> Twice:
    """Compute what `check_update` does once, with every operation run twice. Collective."""
    batch, unit = _unit(groups)
    with Twice(replay=True) as found:
        _gradient(trainer, loss, _with_columns(batch, trainer.forward([unit])[0].numpy()))
    return found


def _unit(groups: Sequence[Group]) -> tuple[StepBatch, TokenBatch]:
    num_rows = sum(len(group.responses) for group in groups)
    settings = SplitSettings(
        num_minibatches=1, shuffle_seed=None, rows_for_forward=num_rows, rows_for_update=num_rows, max_tokens=None
    )
    batch = StepBatch(StepRows(groups, step=0, settings=settings), [True] * num_rows)
    return batch, batch.for_forward()[0]


def _with_columns(batch: StepBatch, found_M: np.ndarray) -> MiniBatch:
    """The unit with every column that a loss may read: advantages of both signs, and a reference that differs."""
    values_M, num_tokens_N = torch.from_numpy(found_M), torch.from_numpy(batch.num_tokens_N)
    advantage_M = (1.0 - 2.0 * (torch.arange(len(num_tokens_N)) % 2)).repeat_interleave(num_tokens_N)
    columns = dict.fromkeys(Column, values_M) | {
        Column.ADVANTAGE: advantage_M,
        Column.RETURN: advantage_M,
        Column.REF_LOGPROB: values_M - 0.25,
    }
    return batch.for_update(columns, batch.num_tokens_N > 0)[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gradient:
    values_M: np.ndarray
    """Log-probs, or a critic's values, of the forward pass that it belongs to."""
    checksums: Checksums
    """Of this rank's shard."""


def _gradient(trainer: Trainer, loss: Loss, batch: MiniBatch) -> _Gradient:
    """Compute a gradient, and drop it."""
    before, watched = rng.capture(), _WatchedLoss(loss)
    # Every rank computes the same unit.
    on_every_rank = Round(units=batch.units, num_slots=trainer.world_size)
    trainer.forward_backward(RankBatch(rounds=(on_every_rank,), norm=batch.norm), watched)
    found = checksums(WeightPiece(name, 0, gradient) for name, gradient in trainer.gradients())
    trainer.drop_gradients()
    rng.restore(before)
    return _Gradient(values_M=watched.values_M, checksums=found)


class _WatchedLoss:
    """A loss that keeps the log-probs, or values, that it was given last."""

    def __init__(self, loss: Loss) -> None:
        self._loss, self.wants_entropy = loss, loss.wants_entropy
        self.values_M = np.empty(0, dtype=np.float32)

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """As `Loss`."""
        values_M = inputs.value_M if inputs.logprob_M is None else inputs.logprob_M
        assert values_M is not None
        self.values_M = values_M.detach().cpu().numpy()
        return self._loss(inputs)
