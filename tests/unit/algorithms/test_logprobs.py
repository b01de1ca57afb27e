"""Log-probs and entropies against numbers worked out by hand, and against autograd."""

import math

import pytest
import torch

from rlinf_lite.algorithms import token_entropy, token_logprobs

LOGITS = torch.tensor([[[math.log(1.0), math.log(2.0), math.log(5.0)], [0.0, 0.0, 0.0]]])  # p: 1/8 2/8 5/8; 1/3 each


def autograd_logprobs(logits, targets, temperature):
    return torch.log_softmax(logits.float() / temperature, dim=-1).gather(-1, targets[..., None]).squeeze(-1)


def test_logprobs_by_hand():
    # log(5/8) = -0.4700036, log(1/3) = -1.0986123
    logprobs = token_logprobs(LOGITS, torch.tensor([[2, 0]]), 1.0)
    torch.testing.assert_close(logprobs, torch.tensor([[-0.4700036, -1.0986123]]), rtol=0, atol=1e-6)


def test_temperature_by_hand():
    # Temperature 0.5 squares the odds: 1, 4, 25 of 30; log(4/30) = -2.0149030
    logprobs = token_logprobs(LOGITS, torch.tensor([[1, 0]]), 0.5)
    torch.testing.assert_close(logprobs, torch.tensor([[-2.0149030, -1.0986123]]), rtol=0, atol=1e-6)


def test_entropy_by_hand():
    # 1/8 log 8 + 2/8 log 4 + 5/8 log(8/5) = 0.2599302 + 0.3465736 + 0.2937523 = 0.9002561; log 3 = 1.0986123
    entropy = token_entropy(LOGITS, 1.0)
    torch.testing.assert_close(entropy, torch.tensor([[0.9002561, 1.0986123]]), rtol=0, atol=1e-6)


def test_entropy_temperature_by_hand():
    # 1/30 log 30 + 4/30 log 7.5 + 25/30 log 1.2 = 0.1133732 + 0.2686537 + 0.1519346 = 0.5339616
    entropy = token_entropy(LOGITS, 0.5)
    torch.testing.assert_close(entropy, torch.tensor([[0.5339616, 1.0986123]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprob_gradient_equals_autograds(temperature):
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 11)
    targets, weights = torch.randint(0, 11, (3, 5)), torch.randn(3, 5)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (token_logprobs(ours, targets, temperature) * weights).sum().backward()
    (autograd_logprobs(theirs, targets, temperature) * weights).sum().backward()
    assert torch.equal(token_logprobs(logits, targets, temperature), autograd_logprobs(logits, targets, temperature))
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_logprob_gradient_by_hand():
    logits = LOGITS.clone().requires_grad_()
    token_logprobs(logits, torch.tensor([[2, 0]]), 1.0)[0, 0].backward()
    # (is target) - p: -1/8, -2/8, 1 - 5/8; the other column is not asked for
    expected = torch.tensor([[[-0.125, -0.25, 0.375], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-6)


def test_entropy_gradient_by_hand():
    logits = LOGITS.clone().requires_grad_()
    token_entropy(logits, 1.0).sum().backward()
    # dH/dz = -p (log p + H): -1/8 (-2.0794415 + 0.9002561) = 0.1473982, -2/8 (-1.3862944 + 0.9002561) = 0.1215096,
    # -5/8 (-0.4700036 + 0.9002561) = -0.2689078; uniform: 0
    expected = torch.tensor([[[0.1473982, 0.1215096, -0.2689078], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-6)


def test_bf16_logits_are_worked_on_in_float32():
    torch.manual_seed(1)
    logits = (torch.randn(2, 4, 50) * 4).bfloat16()
    targets = torch.randint(0, 50, (2, 4))
    assert torch.equal(token_logprobs(logits, targets, 1.0), token_logprobs(logits.float(), targets, 1.0))
    assert torch.equal(token_entropy(logits, 1.0), token_entropy(logits.float(), 1.0))
    assert token_logprobs(logits, targets, 1.0).dtype == token_entropy(logits, 1.0).dtype == torch.float32
    logits.requires_grad_()
    (token_logprobs(logits, targets, 1.0).sum() + token_entropy(logits, 1.0).sum()).backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16 and logits.grad.abs().sum() > 0


def test_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(2)
    logits, targets = torch.randn(4, 6, 33), torch.randint(0, 33, (4, 6))
    assert torch.equal(token_logprobs(logits, targets, 0.9)[2:3], token_logprobs(logits[2:3], targets[2:3], 0.9))
    assert torch.equal(token_entropy(logits, 0.9)[2:3], token_entropy(logits[2:3], 0.9))


def test_large_logits_and_impossible_tokens():
    logits = torch.tensor([[[1e4, 1e4, -torch.inf]]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([[0]]), 1.0), token_entropy(logits, 1.0)
    torch.testing.assert_close(logprobs, torch.tensor([[-0.6931472]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy, torch.tensor([[0.6931472]]), rtol=0, atol=1e-6)
    (logprobs + entropy).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[[0.5, -0.5, 0.0]]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)])
def test_empty(shape):
    logits = torch.zeros(shape)
    assert token_logprobs(logits, torch.zeros(shape[:2], dtype=torch.int64), 1.0).shape == shape[:2]
    assert token_entropy(logits, 1.0).shape == shape[:2]
