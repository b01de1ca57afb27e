"""Peak memory of log-probs and their gradients, as the estimates in the configs assume it."""

from __future__ import annotations

import pytest
import torch

from rlinf_lite.models import head

NUM_TOKENS, HIDDEN, VOCAB = 128, 2, 4096
BYTES_PER_LOGIT = 13


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(head, "MAX_KEPT_BYTES", 0)


@pytest.fixture
def peak_bytes(live_bytes):
    """Peak bytes of a head's log-probs, a loss and the backward pass; ``into`` takes log-probs and gradients."""

    def measure(
        *, entropy_bonus: float, dtype: torch.dtype = torch.bfloat16, into: list[torch.Tensor] | None = None
    ) -> int:
        torch.manual_seed(0)
        weight = (torch.randn(VOCAB, HIDDEN) / 4).to(dtype).requires_grad_()
        hidden = torch.randn(NUM_TOKENS, HIDDEN).to(dtype).requires_grad_()
        targets = torch.randint(0, VOCAB, (NUM_TOKENS,))
        with live_bytes() as live:
            logprob, entropy = head.token_stats(hidden, weight, None, targets, 1.0, with_entropy=bool(entropy_bonus))
            loss = -logprob.mean() if entropy is None else -(logprob + entropy_bonus * entropy).mean()
            loss.backward()
        if into is not None:
            assert hidden.grad is not None and weight.grad is not None
            into += [logprob.detach(), hidden.grad, weight.grad]
        return live.peak

    return measure


@pytest.mark.parametrize("entropy_bonus", [0.0, 0.001])
@pytest.mark.parametrize("num_rows", [4, 8])
def test_no_more_than_a_chunk_of_logits(peak_bytes, monkeypatch, entropy_bonus, num_rows):
    """BYTES_PER_LOGIT of a chunk, and nothing that grows with tokens times vocabulary."""
    monkeypatch.setattr(head, "MAX_ELEMENTS", num_rows * VOCAB)
    others = 32 * NUM_TOKENS * 4 + 8 * VOCAB * HIDDEN  # values per token; the weight's gradient in fp32 and bf16
    peak = peak_bytes(entropy_bonus=entropy_bonus)
    assert 11 * num_rows * VOCAB <= peak <= BYTES_PER_LOGIT * num_rows * VOCAB + others


@pytest.mark.parametrize("num_rows", [4, 8])
def test_a_chunk_is_gone_before_the_next(peak_bytes, monkeypatch, num_rows):
    """In fp32: its logits and their gradient."""
    monkeypatch.setattr(head, "MAX_ELEMENTS", num_rows * VOCAB)
    others = 32 * NUM_TOKENS * 4 + 8 * VOCAB * HIDDEN
    assert peak_bytes(entropy_bonus=0.0, dtype=torch.float32) <= 8 * num_rows * VOCAB + others


@pytest.mark.parametrize("entropy_bonus", [0.0, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_kept", [0, 1, 31, 32])
def test_logits_that_are_kept_cost_their_bytes_and_change_no_bit(
    peak_bytes, monkeypatch, entropy_bonus, dtype, num_kept
):
    """Of so many of 32 chunks."""
    monkeypatch.setattr(head, "MAX_ELEMENTS", 4 * VOCAB)
    found = []
    for kept in (0, num_kept):
        chunk = 4 * VOCAB * dtype.itemsize
        monkeypatch.setattr(head, "MAX_KEPT_BYTES", (kept + 1) * chunk - 1)
        gradients: list[torch.Tensor] = []
        peak = peak_bytes(entropy_bonus=entropy_bonus, dtype=dtype, into=gradients)
        found.append((peak, gradients))
    (without, expected), (peak, gradients) = found
    assert len(expected) == 3 and all(torch.equal(a, b) for a, b in zip(expected, gradients, strict=True))
    assert 0 <= num_kept * chunk - (peak - without) <= chunk, "the one that is computed with is no other one"


def test_nothing_is_kept_without_a_backward_pass(live_bytes, monkeypatch):
    monkeypatch.setattr(head, "MAX_ELEMENTS", 4 * VOCAB)
    monkeypatch.setattr(head, "MAX_KEPT_BYTES", 1 << 29)
    weight, hidden = torch.randn(VOCAB, HIDDEN).requires_grad_(), torch.randn(NUM_TOKENS, HIDDEN)
    with live_bytes() as live, torch.no_grad():
        head.token_stats(hidden, weight, None, torch.zeros(NUM_TOKENS, dtype=torch.int64), 1.0, with_entropy=False)
    assert live.peak <= 3 * 4 * VOCAB * 4 + 32 * NUM_TOKENS * 4
