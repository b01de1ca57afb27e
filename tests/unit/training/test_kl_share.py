"""The KL term's fraction of the gradient: compared with values by hand, and summed over micro-batches."""

from __future__ import annotations

import math

import pytest
import torch

from rlinf_lite.algorithms import token_logprobs
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.runner.metrics import update_metrics
from rlinf_lite.training.objective import micro_batch_loss
from rlinf_lite.training.trainer import UpdateReport
from rlinf_lite.types import MicroBatch, RankBatch

LOGITS = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([[1, 2, 3], [4, 5, 6]])
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
ADVANTAGES = torch.tensor([[2.0], [-1.0]]).expand(2, 3)
LOGPROBS = token_logprobs(LOGITS, TARGETS, 1.0)


def loss_and_sums(ref=None, old=None, logits=None, **changes):
    micro = MicroBatch(
        index=0,
        input_ids_BT=torch.zeros(2, 4, dtype=torch.int64),
        loss_mask_BT=MASK,
        advantages_BT=ADVANTAGES,
        min_prompt_len=1,
        ref_logprobs_BT=ref,
        old_logprobs_BT=old,
    )
    batch = RankBatch(micro_batches=(micro,), num_tokens=5, num_sequences=2)
    logits = LOGITS.clone().requires_grad_() if logits is None else logits
    return micro_batch_loss(logits, TARGETS, 0, micro, batch, AlgorithmConfig(**changes), 1.0)


def fraction(*micro_sums):
    report = UpdateReport(sums=dict(enumerate(micro_sums)), grad_norm=1.0, lr=0.1, skipped=False)
    return update_metrics([[report]])["loss/kl_grad_fraction"]


def test_the_fraction_by_hand():
    """On-policy, token-mean over 5 tokens: the policy loss has -A / 5 per token, the KL term beta * r / 5."""
    _, sums = loss_and_sums(ref=LOGPROBS - 3.0, kl_beta=0.5, kl_penalty_type="mse")
    assert sums["policy_grad_square"] == pytest.approx((2 * 2.0**2 + 3 * 1.0**2) / 25)
    assert sums["kl_grad_square"] == pytest.approx(5 * (0.5 * 3.0) ** 2 / 25)
    kl, policy = math.sqrt(5) * 1.5, math.sqrt(11)
    assert fraction(sums) == fraction(sums, sums) == pytest.approx(kl / (kl + policy))


def test_a_kl_term_without_gradient():
    _, sums = loss_and_sums(ref=LOGPROBS, kl_beta=0.5)
    assert fraction(sums) == 0.0
    assert fraction({**sums, "policy_grad_square": 0.0}) == 0.0


def test_measuring_it_changes_no_gradient():
    """Bitwise identical to the loss without the measurement."""
    logits = LOGITS.clone().requires_grad_()
    loss, _ = loss_and_sums(ref=LOGPROBS - 0.3, kl_beta=0.5, logits=logits)
    (measured,) = torch.autograd.grad(loss, logits)
    logprobs = token_logprobs(logits, TARGETS, 1.0)
    ratio = (logprobs - logprobs.detach()).clamp(-20, 20).exp()
    free, clipped = -ADVANTAGES * ratio, -ADVANTAGES * ratio.clamp(0.8, 1.2)
    policy = torch.where(MASK != 0, torch.maximum(free, clipped), 0.0).sum() / 5
    log_ratio = LOGPROBS - 0.3 - logprobs
    kl = torch.where(MASK != 0, log_ratio.exp() - log_ratio - 1.0, 0.0).sum() / 5
    (plain,) = torch.autograd.grad(policy + 0.5 * kl, logits)
    assert torch.equal(measured, plain)


def test_the_loss_uses_the_corrected_form_if_configured():
    old, ref = LOGPROBS + 0.4, LOGPROBS - 3.0
    _, sums = loss_and_sums(ref=ref, old=old, kl_beta=0.5, kl_importance_correction=True)
    ratio = math.exp(-0.4)
    assert sums["kl_grad_square"] == pytest.approx(5 * (0.5 * ratio * 3.0) ** 2 / 25, rel=1e-5)
    assert sums["ref_kl"] == pytest.approx(5 * ratio * (math.exp(-3) + 3 - 1), rel=1e-5)


def test_without_a_kl_term_nothing_is_measured():
    _, sums = loss_and_sums()
    assert not {"kl_grad_square", "policy_grad_square", "kl_loss"} & sums.keys()
