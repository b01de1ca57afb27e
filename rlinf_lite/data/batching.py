"""Splits a step's rollouts into mini-batches and micro-batches, by settings and step alone: the number of ranks plays
no part."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from rlinf_lite.config import AlgorithmConfig, RolloutConfig, RunnerConfig
from rlinf_lite.counters import permutation
from rlinf_lite.types import MicroBatch, MiniBatch, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """How `StepBatch` splits a step's rollouts, and what a micro-batch holds."""

    num_minibatches: int
    """Optimizer steps per training step."""
    shuffle_seed: int | None
    """Rows are shuffled by (this seed, step); None: they keep their order."""
    rows_for_logprobs: int
    """Rows per micro-batch of a pass that only computes log-probs; not used with ``max_tokens``."""
    rows_for_update: int
    """Rows per micro-batch of an update; not used with ``max_tokens``."""
    max_tokens: int | None
    """Limit on rows x longest row of a micro-batch, padding included; None: the numbers of rows apply."""
    with_rollout: bool
    """Whether micro-batches hold the engine's log-probs."""

    @classmethod
    def of(cls, algorithm: AlgorithmConfig, runner: RunnerConfig, rollout: RolloutConfig, *, seed: int) -> Self:
        """The batching that a config asks for; rows are shuffled, if at all, with ``seed``."""
        return cls(
            num_minibatches=algorithm.n_minibatches,
            shuffle_seed=seed if algorithm.shuffle_rollout else None,
            rows_for_logprobs=algorithm.logprob_forward_micro_batch_size,
            rows_for_update=algorithm.training_batch_size_per_gpu,
            max_tokens=runner.max_tokens_per_mbs if runner.enable_dynamic_batch_size else None,
            with_rollout=rollout.return_logprobs,
        )


def arrange(num_rows: int, step: int, *, num_minibatches: int, shuffle_seed: int | None) -> list[list[int]]:
    """The row numbers of each mini-batch, in order; shuffled by (seed, step) unless the seed is None."""
    assert num_rows and num_rows % num_minibatches == 0, (num_rows, num_minibatches)
    order = list(range(num_rows))
    if shuffle_seed is not None:
        order = permutation(num_rows, "shuffle", shuffle_seed, step).tolist()
    size = num_rows // num_minibatches
    return [order[first : first + size] for first in range(0, num_rows, size)]


def micro_rows(rows: Sequence[int], lengths: Sequence[int], size: int, max_tokens: int | None) -> list[list[int]]:
    """Split the rows of a mini-batch into micro-batches; returns the row numbers of each.

    Args:
        rows: row numbers, in order.
        lengths: tokens of each row of the whole batch.
        size: rows per micro-batch; not used with ``max_tokens``.
        max_tokens: limit on rows x longest row, padding included; a single row may be longer.
    """
    if max_tokens is None:
        return [list(rows[first : first + size]) for first in range(0, len(rows), size)]
    micros: list[list[int]] = []
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
        if not micros or (len(micros[-1]) + 1) * longest > max_tokens:
            micros.append([])
            longest = lengths[row]
        micros[-1].append(row)
    return micros


def collate(
    index: int,
    rows: Sequence[int],
    rollouts: Sequence[Rollout],
    advantages_N: Tensor,
    pad_id: int,
    *,
    with_rollout: bool,
    left_out: Container[int] = (),
) -> MicroBatch:
    """Build a micro-batch: prompt + response of each row, right-padded to the longest.

    Args:
        index: place in the mini-batch.
        rows: row numbers.
        rollouts, advantages_N: of the whole batch.
        with_rollout: whether to include the engine's log-probs.
        left_out: rows that have no loss tokens. They stay in the batch, so that its shape does not depend on them.
    """
    chosen = [rollouts[row] for row in rows]
    assert all(len(r.prompt_ids) for r in chosen), "no token predicts the first one"
    assert all(len(r.response_ids) for row, r in zip(rows, chosen, strict=True) if row not in left_out)
    width = max(len(r.prompt_ids) + len(r.response_ids) for r in chosen)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask, advantages, reported = (np.zeros((len(rows), width - 1), dtype=np.float32) for _ in range(3))
    for i, (row, rollout) in enumerate(zip(rows, chosen, strict=True)):
        start, stop = len(rollout.prompt_ids), len(rollout.prompt_ids) + len(rollout.response_ids)
        ids[i, :start], ids[i, start:stop] = rollout.prompt_ids, rollout.response_ids
        if row in left_out:
            continue  # its log-probs may not be finite
        mask[i, start - 1 : stop - 1] = 1.0
        advantages[i, start - 1 : stop - 1] = float(advantages_N[row])
        if with_rollout:
            reported[i, start - 1 : stop - 1] = rollout.logprobs
    return MicroBatch(
        index=index,
        input_ids_BT=torch.from_numpy(ids),
        loss_mask_BT=torch.from_numpy(mask),
        advantages_BT=torch.from_numpy(advantages),
        min_prompt_len=min(len(r.prompt_ids) for r in chosen),
        rollout_logprobs_BT=torch.from_numpy(reported) if with_rollout else None,
    )


class StepBatch:
    """The batch of one training step, split into micro-batches for log-prob passes and for updates."""

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        advantages_N: Tensor,
        *,
        step: int,
        pad_id: int,
        batching: Batching,
        left_out: Container[int] = (),
    ) -> None:
        """
        Args:
            rollouts: N of them, in canonical order.
            advantages_N: float32 [N].
            step: the number of the step.
            left_out: rows without loss tokens. The split does not depend on them.
        """
        self.rollouts, self._advantages_N, self._pad_id = rollouts, advantages_N, pad_id
        self._left_out = left_out
        self._lengths = [len(r.prompt_ids) + len(r.response_ids) for r in rollouts]
        self._batching = batching
        self.minibatch_rows = arrange(
            len(rollouts), step, num_minibatches=batching.num_minibatches, shuffle_seed=batching.shuffle_seed
        )

    def for_logprobs(self) -> tuple[list[list[int]], list[MicroBatch]]:
        """Row numbers, and micro-batches, of passes that only compute log-probs."""
        size, max_tokens = self._batching.rows_for_logprobs, self._batching.max_tokens
        row_lists = micro_rows(range(len(self.rollouts)), self._lengths, size, max_tokens)
        return row_lists, [self._collate(index, rows) for index, rows in enumerate(row_lists)]

    def for_update(self, logprobs: Mapping[str, Sequence[np.ndarray]]) -> list[MiniBatch]:
        """One `MiniBatch` per optimizer step.

        Args:
            logprobs: ``{"old_logprobs_BT" | "ref_logprobs_BT": one float32 [R] per row, of its response}``; may be
                empty. Entries of rows that are left out are not read.
        """
        size, max_tokens = self._batching.rows_for_update, self._batching.max_tokens
        minibatches = []
        for rows in self.minibatch_rows:
            micros = []
            for index, part in enumerate(micro_rows(rows, self._lengths, size, max_tokens)):
                micro = self._collate(index, part)
                columns: dict[str, Any] = {name: self._spread(micro, part, by_row) for name, by_row in logprobs.items()}
                micros.append(replace(micro, **columns))
            trained = [row for row in rows if row not in self._left_out]
            num_tokens = sum(len(self.rollouts[row].response_ids) for row in trained)
            minibatches.append(
                MiniBatch(micro_batches=tuple(micros), num_tokens=num_tokens, num_sequences=len(trained))
            )
        return minibatches

    def by_row(self, row_lists: Sequence[Sequence[int]], logprobs: Mapping[int, Tensor]) -> list[np.ndarray]:
        """Log-probs per row, from those per micro-batch: one float32 [R] per response, empty if the row is left out.

        Args:
            row_lists: as `for_logprobs` returned them.
            logprobs: micro-batch index -> float32 [B, T-1].
        """
        result: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(self.rollouts)
        for index, rows in enumerate(row_lists):
            for i, row in enumerate(rows):
                start, stop = self._response_columns(row)
                if row not in self._left_out:
                    result[row] = logprobs[index][i, start:stop].numpy()
        return result

    def _spread(self, micro: MicroBatch, rows: Sequence[int], by_row: Sequence[np.ndarray]) -> Tensor:
        """[B, T-1] with each row's values at its response tokens, 0 elsewhere."""
        spread = torch.zeros_like(micro.loss_mask_BT)
        for i, row in enumerate(rows):
            start, stop = self._response_columns(row)
            if row not in self._left_out:
                spread[i, start:stop] = torch.from_numpy(by_row[row])
        return spread

    def _response_columns(self, row: int) -> tuple[int, int]:
        start = len(self.rollouts[row].prompt_ids) - 1
        return start, start + len(self.rollouts[row].response_ids)

    def _collate(self, index: int, rows: Sequence[int]) -> MicroBatch:
        return collate(
            index,
            rows,
            self.rollouts,
            self._advantages_N,
            self._pad_id,
            with_rollout=self._batching.with_rollout,
            left_out=self._left_out,
        )
