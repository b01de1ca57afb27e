"""Splits a step's responses into units of training, by config and step alone: the number of ranks plays no part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from rlinf_lite.config import AlgorithmConfig, RunnerConfig
from rlinf_lite.counters import permutation
from rlinf_lite.types import Column, Group, MiniBatch, Normalizers, Response, Segments, TokenBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSettings:
    """How `StepBatch` splits a step's responses."""

    num_minibatches: int
    """Optimizer steps per training step."""
    shuffle_seed: int | None
    """Responses are shuffled by (this seed, step); None: they keep their order."""
    rows_for_forward: int
    """Responses per unit of a forward pass; not used with ``max_tokens``."""
    rows_for_update: int
    """Responses per unit of an update; not used with ``max_tokens``."""
    max_tokens: int | None
    """Limit on responses x longest one of a unit, prompt and padding included; None: the numbers of responses apply."""

    @classmethod
    def of(cls, algorithm: AlgorithmConfig, runner: RunnerConfig, *, seed: int) -> Self:
        """The split that a config asks for; responses are shuffled, if at all, with ``seed``."""
        return cls(
            num_minibatches=algorithm.n_minibatches,
            shuffle_seed=seed if algorithm.shuffle_rollout else None,
            rows_for_forward=algorithm.logprob_forward_micro_batch_size,
            rows_for_update=algorithm.training_batch_size_per_gpu,
            max_tokens=runner.max_tokens_per_mbs if runner.enable_dynamic_batch_size else None,
        )


def arrange(num_rows: int, step: int, *, num_minibatches: int, shuffle_seed: int | None) -> list[list[int]]:
    """The row numbers of each mini-batch, in order; shuffled by (seed, step) unless the seed is None."""
    assert num_rows and num_rows % num_minibatches == 0, (num_rows, num_minibatches)
    order = list(range(num_rows))
    if shuffle_seed is not None:
        order = permutation(num_rows, "shuffle", shuffle_seed, step).tolist()
    size = num_rows // num_minibatches
    return [order[first : first + size] for first in range(0, num_rows, size)]


def unit_rows(rows: Sequence[int], lengths: Sequence[int], size: int, max_tokens: int | None) -> list[list[int]]:
    """Split the rows of a mini-batch into units; returns the row numbers of each.

    Args:
        rows: row numbers, in order.
        lengths: tokens of each row of the whole batch.
        size: rows per unit; not used with ``max_tokens``.
        max_tokens: limit on rows x longest row, padding included; a single row may be longer.
    """
    if max_tokens is None:
        return [list(rows[first : first + size]) for first in range(0, len(rows), size)]
    units: list[list[int]] = []
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
        if not units or (len(units[-1]) + 1) * longest > max_tokens:
            units.append([])
            longest = lengths[row]
        units[-1].append(row)
    return units


class StepBatch:
    """The responses of one training step, split into units for forward passes and for updates.

    Columns of the whole step are flat: values of the loss tokens of all counted responses, end to end, in canonical
    order.
    """

    def __init__(
        self, groups: Sequence[Group], is_counted: Sequence[bool], *, step: int, settings: SplitSettings
    ) -> None:
        """
        Args:
            groups: in canonical order, with N responses in all.
            is_counted: one per response. The others have no loss tokens. They stay in the units, so that no split
                depends on them.
            step: the number of the step.
        """
        self._rows: list[tuple[int, Response]] = [(g, r) for g, group in enumerate(groups) for r in group.responses]
        self._prompts = [np.asarray(group.prompt.problem.prompt_ids, dtype=np.int64) for group in groups]
        assert all(len(prompt) for prompt in self._prompts), "no token predicts the first one"
        self._settings = settings
        self._lengths = [len(self._prompts[group]) + len(response.token_ids) for group, response in self._rows]
        self._loss_tokens = [
            np.flatnonzero(response.loss_mask) if counted else np.empty(0, dtype=np.int64)
            for (_, response), counted in zip(self._rows, is_counted, strict=True)
        ]
        self.num_tokens_N = np.array([len(tokens) for tokens in self._loss_tokens], dtype=np.int64)
        """int64 [N]: loss tokens of each response."""
        self._first = np.concatenate([[0], self.num_tokens_N.cumsum()])
        self.minibatch_rows = arrange(
            len(self._rows), step, num_minibatches=settings.num_minibatches, shuffle_seed=settings.shuffle_seed
        )

    def engine_logprobs(self) -> Tensor:
        """The engine's log-probs, as a column of the whole step."""
        found = [np.empty(0, dtype=np.float32)]
        for (_, response), tokens in zip(self._rows, self._loss_tokens, strict=True):
            if len(tokens):
                assert response.logprobs is not None, "rollout.return_logprobs is false"
                found.append(response.logprobs[tokens])
        return torch.from_numpy(np.concatenate(found))

    def for_forward(self) -> list[TokenBatch]:
        """Units of forward passes; concatenated in their order, their loss tokens are those of the whole step."""
        size = self._settings.rows_for_forward
        row_lists = unit_rows(range(len(self._rows)), self._lengths, size, self._settings.max_tokens)
        return [self._unit(index, rows, self.num_tokens_N > 0, {}) for index, rows in enumerate(row_lists)]

    def for_update(self, columns: Mapping[Column, Tensor], is_trained_N: np.ndarray) -> list[MiniBatch]:
        """One `MiniBatch` per optimizer step.

        Args:
            columns: of the whole step, float32.
            is_trained_N: bool [N]: counted responses that contribute to the loss.
        """
        size = self._settings.rows_for_update
        with_loss_N = is_trained_N & (self.num_tokens_N > 0)
        minibatches = []
        for rows in self.minibatch_rows:
            parts = unit_rows(rows, self._lengths, size, self._settings.max_tokens)
            units = tuple(self._unit(index, part, with_loss_N, columns) for index, part in enumerate(parts))
            num_tokens = int(self.num_tokens_N[rows][with_loss_N[rows]].sum())
            norm = Normalizers(num_tokens=num_tokens, num_sequences=int(with_loss_N[rows].sum()))
            minibatches.append(MiniBatch(units=units, norm=norm))
        return minibatches

    def _unit(
        self, index: int, rows: Sequence[int], with_loss_N: np.ndarray, columns: Mapping[Column, Tensor]
    ) -> TokenBatch:
        builder = _UnitBuilder()
        loss_tokens = [self._loss_tokens[row] if with_loss_N[row] else _NO_TOKENS for row in rows]
        for row, tokens in zip(rows, loss_tokens, strict=True):
            group, response = self._rows[row]
            builder.add(group, self._prompts[group], response.token_ids, tokens)
        chosen_M = torch.from_numpy(_ranges(self._first[list(rows)], [len(tokens) for tokens in loss_tokens]))
        return builder.build(index, {name: values[chosen_M] for name, values in columns.items()})


_NO_TOKENS = np.empty(0, dtype=np.int64)


def _ranges(first_S: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """``[first, first + 1, ...]`` of each size, end to end."""
    sizes_S = np.asarray(sizes, dtype=np.int64)
    shift_S = first_S - (sizes_S.cumsum() - sizes_S)
    return np.arange(sizes_S.sum()) + shift_S.repeat(sizes_S)


class _UnitBuilder:
    """Collects the segments and loss tokens of one unit."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        """Of each segment."""
        self._first_positions: list[int] = []
        self._parents: list[int] = []
        self._prompts: dict[int, int] = {}
        """Their segments, by group."""
        self._responses: list[int] = []
        """Segments."""
        self._loss_tokens: list[np.ndarray] = []

    def add(self, group: int, prompt_P: np.ndarray, response_R: np.ndarray, tokens: np.ndarray) -> None:
        """
        Args:
            group: names the prompt, which is stored once.
            tokens: indices of the loss tokens in ``response_R``.
        """
        if group not in self._prompts:
            self._prompts[group] = self._add_segment(prompt_P, first_position=0, parent=-1)
        segment = self._add_segment(response_R, first_position=len(prompt_P), parent=self._prompts[group])
        self._responses.append(segment)
        self._loss_tokens.append(tokens)

    def _add_segment(self, ids: np.ndarray, *, first_position: int, parent: int) -> int:
        self._ids.append(ids)
        self._first_positions.append(first_position)
        self._parents.append(parent)
        return len(self._ids) - 1

    def build(self, index: int, columns: Mapping[Column, Tensor]) -> TokenBatch:
        sizes_S, parent_S = np.array([len(ids) for ids in self._ids]), np.array(self._parents)
        stop_S = sizes_S.cumsum()
        start_S = stop_S - sizes_S
        ids_N = np.concatenate(self._ids)
        num_tokens_R = np.array([len(tokens) for tokens in self._loss_tokens])
        token_M = np.concatenate([_NO_TOKENS, *self._loss_tokens])
        start_M = start_S[self._responses].repeat(num_tokens_R)
        prompt_stop_M = stop_S[parent_S[self._responses]].repeat(num_tokens_R)
        return TokenBatch(
            index=index,
            ids_N=torch.from_numpy(ids_N),
            positions_N=torch.from_numpy(_ranges(np.array(self._first_positions), sizes_S.tolist())),
            segments=Segments(
                start_S=torch.from_numpy(start_S), stop_S=torch.from_numpy(stop_S), parent_S=torch.from_numpy(parent_S)
            ),
            # A token is predicted by the one before it; the first one by the prompt's last.
            source_M=torch.from_numpy(np.where(token_M > 0, start_M + token_M - 1, prompt_stop_M - 1)),
            targets_M=torch.from_numpy(ids_N[start_M + token_M]),
            seq_M=torch.from_numpy(np.arange(len(num_tokens_R)).repeat(num_tokens_R)),
            num_responses=len(num_tokens_R),
            columns=columns,
        )
