"""The models of a step as the loop sees them: what they compute for the algorithm before the update, and the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rlinf_lite.cluster.group import Call, wait_all_lists
from rlinf_lite.cluster.workers.critic import CriticWorkers
from rlinf_lite.cluster.workers.policy import PolicyWorkers
from rlinf_lite.observability import PhaseTimer, log_line
from rlinf_lite.runner.metrics import GAP, Metrics
from rlinf_lite.training.batch import StepBatch
from rlinf_lite.types import Column, TokenBatch

if TYPE_CHECKING:
    from rlinf_lite.training.update import UpdateReport


POLICY_COLUMNS = (Column.ADVANTAGE, Column.OLD_LOGPROB, Column.REF_LOGPROB, Column.ENGINE_LOGPROB)
CRITIC_COLUMNS = (Column.RETURN, Column.OLD_VALUE)


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReports:
    """Every rank's report of each optimizer step; empty for a model that was not trained."""

    policy: Sequence[Sequence[UpdateReport]]
    critic: Sequence[Sequence[UpdateReport]]


@dataclass(kw_only=True)
class Models:
    """The policy with its frozen reference, and the critic if there is one."""

    policy: PolicyWorkers
    critic: CriticWorkers | None
    needs: frozenset[Column]
    """Columns that the algorithm, or more than one mini-batch, needs from before the update."""
    old_from_engine: bool
    """The engine's log-probs are the old ones, and are not recomputed."""
    engine_is_exact: bool
    """The engine's log-probs should be the policy's, bit for bit."""
    critic_warmup_steps: int
    """In the first steps only the critic is trained."""
    _warned: bool = False

    def columns(self, batch: StepBatch, timer: PhaseTimer) -> dict[Column, Tensor]:
        """Compute the columns of the whole step that are needed."""
        found: dict[Column, Tensor] = {}
        if Column.ENGINE_LOGPROB in self.needs:
            found[Column.ENGINE_LOGPROB] = batch.engine_logprobs()
        if self.old_from_engine:
            found[Column.OLD_LOGPROB] = batch.engine_logprobs()
        passes = [column for column in self._passes() if column in self.needs - found.keys()]
        if not passes:
            return found
        with timer.phase("logprob"):
            units = batch.for_forward()
            started = [self._start_pass(column, units) for column in passes]
            for column, of_ranks in zip(passes, wait_all_lists(started), strict=True):
                of_units = {index: values for of_rank in of_ranks for index, values in of_rank.items()}
                found[column] = torch.cat([of_units[unit.index] for unit in units])
        return found

    def _passes(self) -> tuple[Column, ...]:
        return Column.OLD_VALUE, Column.OLD_LOGPROB, Column.REF_LOGPROB

    def _start_pass(self, column: Column, units: Sequence[TokenBatch]) -> list[Call[dict[int, Tensor]]]:
        if column is Column.OLD_VALUE:
            assert self.critic is not None
            return self.critic.start_forward(units)
        return self.policy.start_forward(units, reference=column is Column.REF_LOGPROB)

    def update(
        self,
        step: int,
        batch: StepBatch,
        columns: Mapping[Column, Tensor],
        is_trained_N: np.ndarray,
        *,
        then: Callable[[], None] = lambda: None,
    ) -> UpdateReports:
        """Take the optimizer steps of ``step``: policy and critic at the same time, mini-batch by mini-batch.

        Args:
            then: called when all ranks were asked for the last one: what it asks of them follows without a wait.
        """
        models: dict[str, PolicyWorkers | CriticWorkers] = {}
        if step > self.critic_warmup_steps:
            models["policy"] = self.policy
        if self.critic is not None:
            models["critic"] = self.critic
        wanted = {"policy": POLICY_COLUMNS, "critic": CRITIC_COLUMNS}
        minis = {
            name: batch.for_update({c: columns[c] for c in wanted[name] if c in columns}, is_trained_N)
            for name in models
        }
        reports: dict[str, list[list[UpdateReport]]] = {"policy": [], "critic": []}
        last = batch.num_minibatches - 1
        for number in range(last + 1):
            started = [
                group.start_update(step, minis[name][number], last=number == last) for name, group in models.items()
            ]
            if number == last:
                then()
            for name, of_ranks in zip(models, wait_all_lists(started), strict=True):
                reports[name].append(of_ranks)
        return UpdateReports(policy=reports["policy"], critic=reports["critic"])

    def check_gap(self, step: int, metrics: Metrics) -> None:
        """Warn, once, if the engine's log-probs differ from the policy's, of which they should be the very bits."""
        gap = metrics.get(GAP, 0.0)
        if not (self.engine_is_exact and gap) or self._warned:
            return
        self._warned = True
        remedy = ""
        if self.old_from_engine:
            remedy = (
                " They are this run's old log-probs; rollout.return_logprobs=true with "
                "algorithm.importance_sampling_fix=true recomputes them."
            )
        log_line(
            f"!! {GAP}={gap:.3g} in step {step}: on this machine the engine's log-probs are not the policy's "
            f"(docs/exactness.md).{remedy}"
        )
