"""Peak memory of a micro-batch's loss and backward pass, as the estimates in the configs assume it."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlinf_lite.algorithms import logprobs
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.training.objective import micro_batch_loss
from rlinf_lite.types import MicroBatch, RankBatch

ROWS, COLUMNS, HIDDEN, VOCAB = 4, 32, 2, 4096
PIECE = 8 * VOCAB


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


def peak_bytes(entropy_bonus: float) -> int:
    """Peak bytes of a bf16 head, its logits, the loss and the backward pass, as in `PolicyTrainer`."""
    torch.manual_seed(0)
    head = (torch.randn(VOCAB, HIDDEN) / 4).bfloat16().requires_grad_()
    hidden = torch.randn(ROWS, COLUMNS + 1, HIDDEN).bfloat16().requires_grad_()
    ids = torch.randint(0, VOCAB, (ROWS, COLUMNS + 1))
    ones = torch.ones(ROWS, COLUMNS)
    micro = MicroBatch(
        index=0,
        input_ids_BT=ids,
        loss_mask_BT=ones,
        advantages_BT=torch.randn(ROWS, COLUMNS),
        min_prompt_len=1,
    )
    batch = RankBatch(micro_batches=(micro,), num_tokens=ROWS * COLUMNS, num_sequences=ROWS)
    config = AlgorithmConfig(entropy_bonus=entropy_bonus)
    with LiveBytes() as live:
        backward_of(head, hidden, ids, micro, batch, config)
    return live.peak


def backward_of(head, hidden, ids, micro, batch, config) -> None:
    def loss():  # as in the trainer: when the backward pass starts, only autograd holds the logits
        logits = hidden @ head.T
        return micro_batch_loss(logits[:, :-1], ids[:, 1:], 0, micro, batch, config, 1.0)[0]

    loss().backward()


@pytest.mark.parametrize("entropy_bonus", [0.0, 0.001])
def test_logits_their_gradient_and_a_block_in_float32(monkeypatch, entropy_bonus):
    """2 x 2 bytes per logit, and 9 per logit of a block: float32 twice, and a mask. An entropy bonus adds nothing."""
    monkeypatch.setattr(logprobs, "MAX_ELEMENTS", PIECE)
    num_logits = ROWS * (COLUMNS + 1) * VOCAB
    others = 16 * ROWS * COLUMNS * 4 + 4 * VOCAB * HIDDEN * 2  # values per token, and the head's own weights
    peak = peak_bytes(entropy_bonus)
    assert 4 * num_logits <= peak <= 4 * num_logits + 9 * PIECE + others
