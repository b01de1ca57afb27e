"""From a loss a token to one number, so that micro-batches and ranks only have to be added up.

The normaliser is that of the whole mini-batch: a mean of micro-batch means would weigh tokens by the micro-batch they
happened to fall into. (token-mean is DAPO's, arXiv 2503.14476; seq-mean-token-mean is GRPO's, arXiv 2402.03300.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlinf_lite.algorithms.registry import pick


def aggregate(loss_BT: Tensor, mask_BT: Tensor, kind: str, num_tokens: int, num_sequences: int) -> Tensor:
    """What this micro-batch adds to the mini-batch's value.

    Args:
        loss_BT: [B, T].
        mask_BT: [B, T], nonzero on the tokens that count.
        kind: a key of `AGGREGATORS`.
        num_tokens: counting tokens of the whole mini-batch, over all ranks.
        num_sequences: rows of the whole mini-batch, over all ranks.

    Returns:
        Scalar. A row without counting tokens adds 0.

    Raises:
        ValueError: unknown ``kind``.
    """
    aggregator = pick(AGGREGATORS, "algorithm.loss_agg_func", kind)
    is_counted_BT = mask_BT != 0
    # Not loss * mask: a masked position may hold inf or NaN (log-probs of padding), and 0 * NaN is NaN.
    return aggregator(torch.where(is_counted_BT, loss_BT, 0.0), is_counted_BT, num_tokens, num_sequences)


def _token_mean(loss_BT: Tensor, _is_counted_BT: Tensor, num_tokens: int, _num_sequences: int) -> Tensor:
    return loss_BT.sum() / max(num_tokens, 1)


def _seq_mean_token_sum(loss_BT: Tensor, _is_counted_BT: Tensor, _num_tokens: int, num_sequences: int) -> Tensor:
    return loss_BT.sum(dim=1).sum() / max(num_sequences, 1)


def _seq_mean_token_mean(loss_BT: Tensor, is_counted_BT: Tensor, _num_tokens: int, num_sequences: int) -> Tensor:
    num_tokens_B = is_counted_BT.sum(dim=1).clamp(min=1)
    return (loss_BT.sum(dim=1) / num_tokens_B).sum() / max(num_sequences, 1)


AGGREGATORS: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "token-mean": _token_mean,
    "seq-mean-token-sum": _seq_mean_token_sum,
    "seq-mean-token-mean": _seq_mean_token_mean,
}
"""``algorithm.loss_agg_func``: masked loss [B, T], what counts (bool [B, T]), num_tokens, num_sequences to a scalar."""
