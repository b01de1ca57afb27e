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


def peak_bytes(*, entropy_bonus: float, dtype: torch.dtype = torch.bfloat16) -> int:
    """Peak bytes of a head's log-probs, a loss and the backward pass."""
    torch.manual_seed(0)
    weight = (torch.randn(VOCAB, HIDDEN) / 4).to(dtype).requires_grad_()
    hidden = torch.randn(NUM_TOKENS, HIDDEN).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (NUM_TOKENS,))
    with LiveBytes() as live:
        logprob, entropy = head.token_stats(hidden, weight, None, targets, 1.0, with_entropy=bool(entropy_bonus))
        loss = -logprob.mean() if entropy is None else -(logprob + entropy_bonus * entropy).mean()
        loss.backward()
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
