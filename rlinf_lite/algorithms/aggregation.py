"""Reduce per-token losses to a scalar, such that the scalars of all micro-batches and ranks add up to the mini-batch's.

The normalizer is that of the whole mini-batch: a mean of micro-batch means would weight a token by the size of its
micro-batch. (token-mean is DAPO's, arXiv 2503.14476; seq-mean-token-mean is GRPO's, arXiv 2402.03300.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlinf_lite.algorithms.registry import pick


def aggregate(loss_BT: Tensor, mask_BT: Tensor, kind: str, num_tokens: int, num_sequences: int) -> Tensor:
    """Reduce the losses of one micro-batch to what it adds to the mini-batch's loss.

    Args:
        loss_BT: [B, T].
        mask_BT: [B, T], nonzero on loss tokens.
        kind: a key of `AGGREGATORS`.
        num_tokens: loss tokens of the whole mini-batch, over all ranks.
        num_sequences: rows of the whole mini-batch, over all ranks.

    Returns:
        Scalar. A row without loss tokens adds 0.

    Raises:
        ValueError: unknown ``kind``.
    """
    aggregator = pick(AGGREGATORS, "algorithm.loss_agg_func", kind)
    is_loss_BT = mask_BT != 0
    # Not loss * mask: a masked position may hold inf or NaN (log-probs of padding), and 0 * NaN is NaN.
    return aggregator(torch.where(is_loss_BT, loss_BT, 0.0), is_loss_BT, num_tokens, num_sequences)


def _token_mean(loss_BT: Tensor, _is_loss_BT: Tensor, num_tokens: int, _num_sequences: int) -> Tensor:
    return loss_BT.sum() / max(num_tokens, 1)


def _seq_mean_token_sum(loss_BT: Tensor, _is_loss_BT: Tensor, _num_tokens: int, num_sequences: int) -> Tensor:
    return loss_BT.sum(dim=1).sum() / max(num_sequences, 1)


def _seq_mean_token_mean(loss_BT: Tensor, is_loss_BT: Tensor, _num_tokens: int, num_sequences: int) -> Tensor:
    num_tokens_B = is_loss_BT.sum(dim=1).clamp(min=1)
    return (loss_BT.sum(dim=1) / num_tokens_B).sum() / max(num_sequences, 1)


AGGREGATORS: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "token-mean": _token_mean,
    "seq-mean-token-sum": _seq_mean_token_sum,
    "seq-mean-token-mean": _seq_mean_token_mean,
}
"""Values of ``algorithm.loss_agg_func``. Arguments: masked loss [B, T], mask [B, T], num_tokens, num_sequences."""
