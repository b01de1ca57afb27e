"""What an algorithm sees of a step's responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rlinf_lite.algorithms import Graded
from rlinf_lite.types import Column, Group, Response


def is_graded(groups: Sequence[Group]) -> list[bool]:
    """Whether each response of ``groups`` has a grade, in order."""
    return [r.score is not None and r.score.graded for group in groups for r in group.responses]


def graded_table(
    groups: Sequence[Group], is_counted: Sequence[bool], columns: Mapping[Column, Tensor], max_tokens: int
) -> Graded:
    """Gather what `Algorithm.admit` and `Algorithm.credit` are given.

    Args:
        groups: with a score for every response; all of one size.
        is_counted: whether each response takes part in the step; only graded ones may.
        columns: of the whole step, over the loss tokens of the counted responses.
        max_tokens: most tokens of a response.
    """

    def table(values: Sequence[float | bool | int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).reshape(len(groups), -1)

    responses = [response for group in groups for response in group.responses]
    rewards = [response.score.reward if response.score is not None else 0.0 for response in responses]
    return Graded(
        rewards_PG=table(rewards, torch.float64),
        counted_PG=table(is_counted, torch.bool),
        finished_PG=table([response.finished for response in responses], torch.bool),
        num_tokens_PG=torch.from_numpy(_num_loss_tokens(responses) * is_counted).reshape(len(groups), -1),
        max_tokens=max_tokens,
        columns=columns,
    )


def _num_loss_tokens(responses: Sequence[Response]) -> np.ndarray:
    """int64, of each response."""
    masks = [response.loss_mask for response in responses]
    stops = np.cumsum([len(mask) for mask in masks])
    sums = np.concatenate([[0], np.concatenate(masks).cumsum()])
    return np.diff(sums[stops], prepend=0)
