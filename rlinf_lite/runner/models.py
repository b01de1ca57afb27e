"""The models of a step as the loop sees them: what they compute for the algorithm before the update, and the update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rlinf_lite.cluster.workers.policy import PolicyWorkers
from rlinf_lite.observability import PhaseTimer
from rlinf_lite.training.batch import StepBatch
from rlinf_lite.types import Column

if TYPE_CHECKING:
    from rlinf_lite.training.update import UpdateReport


@dataclass(kw_only=True)
class Models:
    """The policy and its frozen reference."""

    policy: PolicyWorkers
    needs: frozenset[Column]
    """Columns that the algorithm, or more than one mini-batch, needs from before the update."""
    old_from_engine: bool
    """The engine's log-probs are the old ones: ``algorithm.recompute_logprobs`` is false."""

    def columns(self, batch: StepBatch, timer: PhaseTimer) -> dict[Column, Tensor]:
        """Compute the columns of the whole step that are needed."""
        found: dict[Column, Tensor] = {}
        if Column.ENGINE_LOGPROB in self.needs:
            found[Column.ENGINE_LOGPROB] = batch.engine_logprobs()
        if self.old_from_engine:
            found[Column.OLD_LOGPROB] = batch.engine_logprobs()
        passes = [column for column in (Column.OLD_LOGPROB, Column.REF_LOGPROB) if column in self.needs - found.keys()]
        if not passes:
            return found
        with timer.phase("logprob"):
            units = batch.for_forward()
            for column in passes:
                of_units = self.policy.forward(units, reference=column is Column.REF_LOGPROB)
                found[column] = torch.cat([of_units[unit.index] for unit in units])
        return found

    def update(
        self, step: int, batch: StepBatch, columns: Mapping[Column, Tensor], is_trained_N: np.ndarray
    ) -> list[Sequence[UpdateReport]]:
        """Take the optimizer steps of ``step``; returns every rank's report of each."""
        *earlier, last = batch.for_update(columns, is_trained_N)
        reports = [self.policy.update(step, mini_batch, last=False) for mini_batch in earlier]
        return [*reports, self.policy.update(step, last, last=True)]
