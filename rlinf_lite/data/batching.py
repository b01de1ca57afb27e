"""From rollouts and advantages to mini-batches of canonical micro-batches: config and step decide, never the ranks."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlinf_lite.config import Config
from rlinf_lite.counters import permutation
from rlinf_lite.types import MicroBatch, MiniBatch, Rollout


def arrange(num_rows: int, step: int, config: Config) -> list[list[int]]:
    """Which rows of the step's batch each mini-batch holds, in order."""
    assert num_rows and num_rows % config.algorithm.n_minibatches == 0, (num_rows, config.algorithm.n_minibatches)
    order = list(range(num_rows))
    if config.algorithm.shuffle_rollout:
        order = permutation(num_rows, "shuffle", config.actor.seed, step).tolist()
    size = num_rows // config.algorithm.n_minibatches
    return [order[first : first + size] for first in range(0, num_rows, size)]


def micro_rows(rows: Sequence[int], lengths: Sequence[int], size: int, max_tokens: int | None) -> list[list[int]]:
    """Cut a mini-batch's rows into micro-batches.

    Args:
        rows: row numbers, in order.
        lengths: tokens of each row of the whole batch.
        size: rows a micro-batch; not used with ``max_tokens``.
        max_tokens: largest rows x longest row; one row alone may be longer.
    """
    if max_tokens is None:
        return [list(rows[first : first + size]) for first in range(0, len(rows), size)]
    cuts: list[list[int]] = []
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
        if not cuts or (len(cuts[-1]) + 1) * longest > max_tokens:
            cuts.append([])
            longest = lengths[row]
        cuts[-1].append(row)
    return cuts


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
    """Right-pad prompt + response of ``rows`` to the longest of them. Rows that are ``left_out`` stay, so that the
    batch is the same, but have no loss tokens: all their columns are padding.
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
            continue  # what it brings may not even be finite
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
    """A step's rollouts, cut twice: for the log-prob passes and for the updates."""

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        advantages_N: Tensor,
        *,
        step: int,
        pad_id: int,
        config: Config,
        left_out: Container[int] = (),
    ) -> None:
        """
        Args:
            rollouts: N of them, in canonical order.
            advantages_N: float32 [N].
            step: the step being made.
            left_out: rows without loss tokens. How the batch is cut does not depend on them.
        """
        self.rollouts, self._advantages_N, self._pad_id = rollouts, advantages_N, pad_id
        self._left_out = left_out
        self._lengths = [len(r.prompt_ids) + len(r.response_ids) for r in rollouts]
        self._with_rollout = config.rollout.return_logprobs
        self._max_tokens = config.runner.max_tokens_per_mbs if config.runner.enable_dynamic_batch_size else None
        self._config = config
        self.minibatch_rows = arrange(len(rollouts), step, config)

    def for_logprobs(self) -> tuple[list[list[int]], list[MicroBatch]]:
        """Rows and micro-batches of the passes that only compute log-probs."""
        size = self._config.algorithm.logprob_forward_micro_batch_size
        cuts = micro_rows(range(len(self.rollouts)), self._lengths, size, self._max_tokens)
        return cuts, [self._collate(index, rows) for index, rows in enumerate(cuts)]

    def for_update(self, logprobs: Mapping[str, Sequence[np.ndarray]]) -> list[MiniBatch]:
        """One `MiniBatch` for each optimizer step.

        Args:
            logprobs: ``{"old_logprobs_BT" | "ref_logprobs_BT": a float32 [R] for each row's response}``; may be empty.
                What is given for rows that are left out is not read.
        """
        size = self._config.algorithm.training_batch_size_per_gpu
        minibatches = []
        for rows in self.minibatch_rows:
            cuts = micro_rows(rows, self._lengths, size, self._max_tokens)
            micros = [self._collate(index, cut) for index, cut in enumerate(cuts)]
            for i, cut in enumerate(cuts):
                fields: dict[str, Any] = {
                    name: self._spread(micros[i], cut, by_row) for name, by_row in logprobs.items()
                }
                micros[i] = replace(micros[i], **fields)
            trained = [row for row in rows if row not in self._left_out]
            num_tokens = sum(len(self.rollouts[row].response_ids) for row in trained)
            minibatches.append(
                MiniBatch(micro_batches=tuple(micros), num_tokens=num_tokens, num_sequences=len(trained))
            )
        return minibatches

    def by_row(self, cuts: Sequence[Sequence[int]], found: Mapping[int, Tensor]) -> list[np.ndarray]:
        """Log-probs of micro-batches, as the actors return them, back to one float32 [R] a row's response; empty for
        rows that are left out.
        """
        rows: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(self.rollouts)
        for index, cut in enumerate(cuts):
            for i, row in enumerate(cut):
                start, stop = self._response_columns(row)
                if row not in self._left_out:
                    rows[row] = found[index][i, start:stop].numpy()
        return rows

    def _spread(self, micro: MicroBatch, cut: Sequence[int], by_row: Sequence[np.ndarray]) -> Tensor:
        spread = torch.zeros_like(micro.loss_mask_BT)
        for i, row in enumerate(cut):
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
            with_rollout=self._with_rollout,
            left_out=self._left_out,
        )
