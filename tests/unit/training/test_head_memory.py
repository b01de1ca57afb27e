"""Peak memory of log-probs and their gradients, as the estimates in the configs assume it."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlinf_lite.models import head

NUM_TOKENS, HIDDEN, VOCAB = 128, 2, 4096
BYTES_PER_LOGIT = 13


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors that operations made; exact on any machine."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen and storage not in given:
                    self._seen.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, num_bytes: int) -> None:
        self.now -= num_bytes


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(head, "MAX_KEPT_BYTES", 0)


def peak_bytes(
    *, entropy_bonus: float, dtype: torch.dtype = torch.bfloat16, into: list[torch.Tensor] | None = None
) -> int:
    """Peak bytes of a head's log-probs, a loss and the backward pass.

    Args:
        into: takes log-probs and gradients.
    """
    torch.manual_seed(0)
    weight = (torch.randn(VOCAB, HIDDEN) / 4).to(dtype).requires_grad_()
    hidden = torch.randn(NUM_TOKENS, HIDDEN).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (NUM_TOKENS,))
    with LiveBytes() as live:
        logprob, entropy = head.token_stats(hidden, weight, None, targets, 1.0, with_entropy=bool(entropy_bonus))
        loss = -logprob.mean() if entropy is None else -(logprob + entropy_bonus * entropy).mean()
        loss.backward()
    if into is not None:
        assert hidden.grad is not None and weight.grad is not None
        into += [logprob.detach(), hidden.grad, weight.grad]
    return live.peak


@pytest.mark.parametrize("entropy_bonus", [0.0, 0.001])
@pytest.mark.parametrize("num_rows", [4, 8])
def test_no_more_than_a_chunk_of_logits(monkeypatch, entropy_bonus, num_rows):
    """BYTES_PER_LOGIT of a chunk, and nothing that grows with tokens times vocabulary."""
    monkeypatch.setattr(head, "MAX_ELEMENTS", num_rows * VOCAB)
    others = 32 * NUM_TOKENS * 4 + 8 * VOCAB * HIDDEN  # values per token; the weight's gradient in fp32 and bf16
    peak = peak_bytes(entropy_bonus=entropy_bonus)
    assert 11 * num_rows * VOCAB <= peak <= BYTES_PER_LOGIT * num_rows * VOCAB + others


@pytest.mark.parametrize("num_rows", [4, 8])
def test_a_chunk_is_gone_before_the_next(monkeypatch, num_rows):
    """In fp32: its logits and their gradient."""
    monkeypatch.setattr(head, "MAX_ELEMENTS", num_rows * VOCAB)
    others = 32 * NUM_TOKENS * 4 + 8 * VOCAB * HIDDEN
    assert peak_bytes(entropy_bonus=0.0, dtype=torch.float32) <= 8 * num_rows * VOCAB + others


@pytest.mark.parametrize("entropy_bonus", [0.0, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_kept", [0, 1, 31, 32])
def test_logits_that_are_kept_cost_their_bytes_and_change_no_bit(monkeypatch, entropy_bonus, dtype, num_kept):
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


def test_nothing_is_kept_without_a_backward_pass(monkeypatch):
    monkeypatch.setattr(head, "MAX_ELEMENTS", 4 * VOCAB)
    monkeypatch.setattr(head, "MAX_KEPT_BYTES", 1 << 29)
    weight, hidden = torch.randn(VOCAB, HIDDEN).requires_grad_(), torch.randn(NUM_TOKENS, HIDDEN)
    with LiveBytes() as live, torch.no_grad():
        head.token_stats(hidden, weight, None, torch.zeros(NUM_TOKENS, dtype=torch.int64), 1.0, with_entropy=False)
    assert live.peak <= 3 * 4 * VOCAB * 4 + 32 * NUM_TOKENS * 4
