"""Sums over the loss tokens of each response, and the reduction of per-token losses to a scalar.

The scalars of all units and ranks add up to the mini-batch's loss, because the normalizer is that of the whole
mini-batch: a mean of means would weight a token by the size of its unit. Nothing here depends on the order in which
threads finish: responses are laid out as padded rows, where each element is written once, and then summed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rlinf_lite.types import Normalizers


class Responses:
    """Where the loss tokens of each response are in a flat tensor: those of one response are contiguous."""

    def __init__(self, seq_M: Tensor, num_responses: int) -> None:
        """
        Args:
            seq_M: int64, non-decreasing, in 0 .. num_responses - 1. A response without loss tokens does not occur.
            num_responses: R.
        """
        self.seq_M, self.num_responses = seq_M, num_responses

    @classmethod
    def of_lengths(cls, num_tokens_R: Tensor) -> Responses:
        """Responses with these numbers of loss tokens, int64 [R]."""
        rows_R = torch.arange(len(num_tokens_R), device=num_tokens_R.device)
        return cls(rows_R.repeat_interleave(num_tokens_R), len(num_tokens_R))

    @cached_property
    def num_tokens_R(self) -> Tensor:
        """int64 [R]."""
        return torch.searchsorted(self.seq_M, self._rows_R, right=True) - self._start_R

    def padded(self, values_M: Tensor) -> Tensor:
        """Lay the responses out as rows: [R, L], 0 after the last loss token of a response."""
        flat = values_M.new_zeros(self.num_responses * self._max_tokens)
        return flat.scatter(0, self._place_M, values_M).reshape(self.num_responses, self._max_tokens)

    def flat(self, values_RL: Tensor) -> Tensor:
        """Undo `padded`: [M]."""
        return values_RL.reshape(-1)[self._place_M]

    def sums(self, values_M: Tensor) -> Tensor:
        """Sum over the loss tokens of each response: [R], 0 for a response without any."""
        return self.padded(values_M).sum(dim=1)

    def means(self, values_M: Tensor) -> Tensor:
        """Average over the loss tokens of each response: [R], 0 for a response without any."""
        return self.sums(values_M) / self.num_tokens_R.clamp(min=1)

    def of_tokens(self, values_R: Tensor) -> Tensor:
        """Repeat a value per response for each of its loss tokens: [M]."""
        return values_R[self.seq_M]

    @cached_property
    def is_last_M(self) -> Tensor:
        """bool [M]: the last loss token of its response."""
        stop_M = self.of_tokens(self._start_R + self.num_tokens_R)
        return torch.arange(1, len(self.seq_M) + 1, device=self.seq_M.device) == stop_M

    @cached_property
    def _rows_R(self) -> Tensor:
        return torch.arange(self.num_responses, device=self.seq_M.device)

    @cached_property
    def _start_R(self) -> Tensor:
        return torch.searchsorted(self.seq_M, self._rows_R)

    @cached_property
    def _max_tokens(self) -> int:
        return int(self.num_tokens_R.max()) if self.num_responses else 0

    @cached_property
    def _place_M(self) -> Tensor:
        """Where a token is in the padded rows, end to end."""
        tokens_M = torch.arange(len(self.seq_M), device=self.seq_M.device)
        return self.seq_M * self._max_tokens + tokens_M - self._start_R[self.seq_M]


def discounted_sums(values_M: Tensor, factor: float, responses: Responses) -> Tensor:
    """Compute s_t = v_t + factor * s_(t+1) within each response, from its last loss token backwards: [M]."""
    values_RL = responses.padded(values_M)
    sums_RL = torch.empty_like(values_RL)
    running_R = values_RL.new_zeros(values_RL.shape[0])
    for column in range(values_RL.shape[1] - 1, -1, -1):
        running_R = values_RL[:, column] + factor * running_R
        sums_RL[:, column] = running_R
    return responses.flat(sums_RL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduction:
    """How per-token losses become one number."""

    kind: str
    """A key of `REDUCTIONS` (``algorithm.loss_agg_func``)."""
    max_tokens: int
    """``algorithm.sampling_params.max_new_tokens``, which ``seq-mean-token-sum-norm`` divides by."""

    def __call__(self, loss_M: Tensor, responses: Responses, norm: Normalizers) -> Tensor:
        """Reduce the losses of one unit to what it adds to the mini-batch's loss.

        Args:
            loss_M: [M].
            norm: of the whole mini-batch.

        Returns:
            Scalar; 0 without loss tokens.
        """
        return REDUCTIONS[self.kind](loss_M, responses, norm, self.max_tokens)


def _token_mean(loss_M: Tensor, _responses: Responses, norm: Normalizers, _max_tokens: int) -> Tensor:
    return loss_M.sum() / max(norm.num_tokens, 1)


def _seq_mean_token_sum(loss_M: Tensor, responses: Responses, norm: Normalizers, _max_tokens: int) -> Tensor:
    return responses.sums(loss_M).sum() / max(norm.num_sequences, 1)


def _seq_mean_token_mean(loss_M: Tensor, responses: Responses, norm: Normalizers, _max_tokens: int) -> Tensor:
    return responses.means(loss_M).sum() / max(norm.num_sequences, 1)


def _seq_mean_token_sum_norm(loss_M: Tensor, responses: Responses, norm: Normalizers, max_tokens: int) -> Tensor:
    return responses.sums(loss_M).sum() / max_tokens / max(norm.num_sequences, 1)


REDUCTIONS: dict[str, Callable[[Tensor, Responses, Normalizers, int], Tensor]] = {
    "token-mean": _token_mean,
    "seq-mean-token-sum": _seq_mean_token_sum,
    "seq-mean-token-mean": _seq_mean_token_mean,
    "seq-mean-token-sum-norm": _seq_mean_token_sum_norm,
}
"""Values of ``algorithm.loss_agg_func``. token-mean: DAPO, arXiv 2503.14476; seq-mean-token-mean: GRPO, arXiv
2402.03300; seq-mean-token-sum-norm: Dr. GRPO, arXiv 2503.20783, which divides by a constant."""
