"""Splits a step's responses into units of training, by config and step alone: the number of ranks plays no part."""

from __future__ import annotations

import functools
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from rlinf_lite.config import AlgorithmConfig, RunnerConfig
from rlinf_lite.counters import permutation
from rlinf_lite.types import Column, Group, MiniBatch, Normalizers, Segments, TokenBatch


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
    """Limit on the tokens of a unit, each prompt once, and equal responses to it once; None: the numbers of responses
    apply."""

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


_PROMPT = -1
"""Stands for a group's prompt where a number names a text."""


@dataclass(frozen=True, slots=True)
class RowSize:
    """The tokens that a response adds to a unit."""

    group: int
    """Names its prompt, which a unit computes once."""
    text: int
    """Names its tokens, which a unit computes once with that prompt."""
    prompt: int
    response: int

    def added(self, held: Container[tuple[int, int]]) -> int:
        """The tokens that it adds to a unit that holds these pairs of group and text, or group and `_PROMPT`."""
        if (self.group, self.text) in held:
            return 0
        return self.response if (self.group, _PROMPT) in held else self.prompt + self.response


def rows_by_number(rows: Sequence[int], number: int) -> list[list[int]]:
    """The row numbers of units with so many rows each."""
    return [list(rows[first : first + number]) for first in range(0, len(rows), number)]


def rows_by_tokens(rows: Sequence[int], sizes: Sequence[RowSize], max_tokens: int) -> list[list[int]]:
    """The row numbers of units with at most ``max_tokens`` tokens each; a single row may have more.

    There are as few units as the order of the rows allows, and the largest is as small as it can be then.

    Args:
        rows: row numbers, in order.
        sizes: of each row of the whole batch.
    """
    units = _filled(rows, sizes, max_tokens)
    low, high = 0, max_tokens  # with ``high`` there are as many units, with ``low`` more
    while high - low > 1:
        limit = (low + high) // 2
        smaller = _filled(rows, sizes, limit)
        if len(smaller) == len(units):
            units, high = smaller, limit
        else:
            low = limit
    return units


def _filled(rows: Sequence[int], sizes: Sequence[RowSize], max_tokens: int) -> list[list[int]]:
    units: list[list[int]] = []
    held: set[tuple[int, int]] = set()
    total = 0
    for row in rows:
        size = sizes[row]
        if not units or total + size.added(held) > max_tokens:
            units.append([])
            held, total = set(), 0
        units[-1].append(row)
        total += size.added(held)
        held |= {(size.group, _PROMPT), (size.group, size.text)}
    return units


class StepRows:
    """The responses of one training step, laid out as units. No grade plays a part, so it is made during grading."""

    def __init__(self, groups: Sequence[Group], *, step: int, settings: SplitSettings) -> None:
        """
        Args:
            groups: in canonical order, with N responses in all; none needs a score.
            step: the number of the step.
        """
        self.settings = settings
        self.responses = [response for group in groups for response in group.responses]
        self._group_N = [number for number, group in enumerate(groups) for _ in group.responses]
        self._prompts = [np.asarray(group.prompt.problem.prompt_ids, dtype=np.int64) for group in groups]
        assert all(len(prompt) for prompt in self._prompts), "no token predicts the first one"
        self.sizes_N = np.array([len(response.token_ids) for response in self.responses], dtype=np.int64)
        """int64 [N]: tokens of each response."""
        texts: dict[bytes, int] = {}
        self._text_N = [texts.setdefault(response.token_ids.tobytes(), len(texts)) for response in self.responses]
        """Names the tokens of each response: equal ones have the same."""
        minibatch_rows = arrange(
            len(self.responses), step, num_minibatches=settings.num_minibatches, shuffle_seed=settings.shuffle_seed
        )
        self.minibatches = [(rows, self._trees(rows, settings.rows_for_update)) for rows in minibatch_rows]
        """The row numbers of each mini-batch, in order, and its units."""

    def trees_for_forward(self) -> list[_Tree]:
        """The units of a forward pass."""
        return self._trees(range(len(self.responses)), self.settings.rows_for_forward)

    def _trees(self, rows: Sequence[int], number: int) -> list[_Tree]:
        limit = self.settings.max_tokens
        parts = rows_by_number(rows, number) if limit is None else rows_by_tokens(rows, self._row_sizes, limit)
        return [self._tree(part) for part in parts]

    @functools.cached_property
    def _row_sizes(self) -> list[RowSize]:
        return [
            RowSize(group, text, len(self._prompts[group]), size)
            for group, text, size in zip(self._group_N, self._text_N, self.sizes_N.tolist(), strict=True)
        ]

    def _tree(self, rows: Sequence[int]) -> _Tree:
        tree = _Tree(rows)
        for row in rows:
            group = self._group_N[row]
            tree.add(group, self._text_N[row], self._prompts[group], self.responses[row].token_ids)
        tree.close()
        return tree


class StepBatch:
    """The responses of one training step, split into units for forward passes and for updates.

    Columns of the whole step are flat: values of the loss tokens of all counted responses, end to end, in canonical
    order.
    """

    def __init__(self, rows: StepRows, is_counted: Sequence[bool]) -> None:
        """
        Args:
            is_counted: one per response. The others have no loss tokens. They stay in the units, so that no split
                depends on them.
        """
        self._rows, sizes_N = rows, rows.sizes_N
        is_loss_T = np.concatenate([response.loss_mask for response in rows.responses])
        self._place_M = np.flatnonzero(is_loss_T & np.asarray(is_counted, dtype=np.bool_).repeat(sizes_N))
        """Index of every loss token of the step among the tokens of all responses."""
        row_M = np.arange(len(sizes_N)).repeat(sizes_N)[self._place_M]
        self._token_M = self._place_M - (sizes_N.cumsum() - sizes_N)[row_M]
        """The same within its response."""
        self.num_tokens_N = np.bincount(row_M, minlength=len(sizes_N))
        """int64 [N]: loss tokens of each response."""
        self._first = np.concatenate([[0], self.num_tokens_N.cumsum()])

    @property
    def num_minibatches(self) -> int:
        """Optimizer steps that `for_update` has units for."""
        return len(self._rows.minibatches)

    def engine_logprobs(self) -> Tensor:
        """The engine's log-probs, as a column of the whole step."""
        found = []
        for response, num_tokens in zip(self._rows.responses, self.num_tokens_N.tolist(), strict=True):
            logprobs = response.logprobs
            assert logprobs is not None or not num_tokens, "rollout.return_logprobs is false"
            found.append(np.zeros(len(response.token_ids), dtype=np.float32) if logprobs is None else logprobs)
        return torch.from_numpy(np.concatenate(found)[self._place_M])

    def for_forward(self) -> list[TokenBatch]:
        """Units of forward passes; concatenated in their order, their loss tokens are those of the whole step."""
        trees = self._rows.trees_for_forward()
        return [self._unit(index, tree, self.num_tokens_N > 0, {}) for index, tree in enumerate(trees)]

    def for_update(self, columns: Mapping[Column, Tensor], is_trained_N: np.ndarray) -> list[MiniBatch]:
        """One `MiniBatch` per optimizer step.

        Args:
            columns: of the whole step, float32.
            is_trained_N: bool [N]: counted responses that contribute to the loss.
        """
        with_loss_N = is_trained_N & (self.num_tokens_N > 0)
        minibatches = []
        for rows, trees in self._rows.minibatches:
            units = tuple(self._unit(index, tree, with_loss_N, columns) for index, tree in enumerate(trees))
            num_tokens = int(self.num_tokens_N[rows][with_loss_N[rows]].sum())
            norm = Normalizers(num_tokens=num_tokens, num_sequences=int(with_loss_N[rows].sum()))
            minibatches.append(MiniBatch(units=units, norm=norm))
        return minibatches

    def _unit(self, index: int, tree: _Tree, with_loss_N: np.ndarray, columns: Mapping[Column, Tensor]) -> TokenBatch:
        rows = tree.rows
        num_tokens_R = np.where(with_loss_N[rows], self.num_tokens_N[rows], 0)
        chosen_M = _ranges(self._first[rows], num_tokens_R)
        chosen = torch.from_numpy(chosen_M)
        of_unit = {name: values[chosen] for name, values in columns.items()}
        return tree.unit(index, self._token_M[chosen_M], num_tokens_R, of_unit)


def _ranges(first_S: np.ndarray, sizes_S: np.ndarray) -> np.ndarray:
    """``[first, first + 1, ...]`` of each size, end to end."""
    shift_S = first_S - (sizes_S.cumsum() - sizes_S)
    return np.arange(sizes_S.sum()) + shift_S.repeat(sizes_S)


class _Tree:
    """The segments of one unit."""

    def __init__(self, rows: Sequence[int]) -> None:
        """
        Args:
            rows: the numbers of the responses that are added.
        """
        self.rows = rows
        self._ids: list[np.ndarray] = []
        """Of each segment."""
        self._first_positions: list[int] = []
        self._parents: list[int] = []
        self._held: dict[tuple[int, int], int] = {}
        """Segments, by group and text; a prompt's by group and `_PROMPT`."""
        self._responses: list[int] = []
        """Their segments; equal responses to a prompt have the same."""

    def add(self, group: int, text: int, prompt_P: np.ndarray, response_R: np.ndarray) -> None:
        """
        Args:
            group: names the prompt, which is stored once.
            text: names the response's tokens, which are stored once below their prompt.
        """
        parent = self._segment((group, _PROMPT), prompt_P, 0, -1)
        self._responses.append(self._segment((group, text), response_R, len(prompt_P), parent))

    def _segment(self, name: tuple[int, int], ids: np.ndarray, first_position: int, parent: int) -> int:
        if (found := self._held.get(name)) is None:
            found = self._held[name] = len(self._ids)
            self._ids.append(ids)
            self._first_positions.append(first_position)
            self._parents.append(parent)
        return found

    def close(self) -> None:
        """Lay the segments end to end: nothing is added any more."""
        sizes_S, parent_S = np.array([len(ids) for ids in self._ids]), np.array(self._parents)
        stop_S = sizes_S.cumsum()
        start_S = stop_S - sizes_S
        self._ids_N = np.concatenate(self._ids)
        self._positions_N = _ranges(np.array(self._first_positions), sizes_S)
        self._start_S, self._stop_S, self._parent_S = start_S, stop_S, parent_S
        self._start_R, self._prompt_stop_R = start_S[self._responses], stop_S[parent_S[self._responses]]

    def unit(
        self, index: int, token_M: np.ndarray, num_tokens_R: np.ndarray, columns: Mapping[Column, Tensor]
    ) -> TokenBatch:
        """
        Args:
            token_M: index of each loss token in its response.
            num_tokens_R: how many of them each response has.
        """
        start_M, prompt_stop_M = self._start_R.repeat(num_tokens_R), self._prompt_stop_R.repeat(num_tokens_R)
        return TokenBatch(
            index=index,
            ids_N=torch.from_numpy(self._ids_N),
            positions_N=torch.from_numpy(self._positions_N),
            segments=Segments(
                start_S=torch.from_numpy(self._start_S),
                stop_S=torch.from_numpy(self._stop_S),
                parent_S=torch.from_numpy(self._parent_S),
            ),
            # A token is predicted by the one before it; the first one by the prompt's last.
            source_M=torch.from_numpy(np.where(token_M > 0, start_M + token_M - 1, prompt_stop_M - 1)),
            targets_M=torch.from_numpy(self._ids_N[start_M + token_M]),
            seq_M=torch.from_numpy(np.arange(len(num_tokens_R)).repeat(num_tokens_R)),
            num_responses=len(num_tokens_R),
            columns=columns,
        )
