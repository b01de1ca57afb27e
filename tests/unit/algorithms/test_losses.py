"""The clipped policy loss and importance weights: values, indicators and gradients by hand."""

import pytest
import torch

from rlinf_lite.algorithms import LOSSES, PolicyLoss, importance_weights, pick, policy_loss


def loss_at(ratio, advantage, **options):
    """Loss and gradient by the log-prob at one token with this ratio; old log-prob -1, clip 0.2 and 0.3."""
    logprobs = (torch.tensor([[-1.0]]) + torch.tensor(ratio).log()).requires_grad_()
    options = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3, **options}
    result = policy_loss(logprobs, torch.tensor([[-1.0]]), torch.tensor([[advantage]]), **options)
    result.loss_BT.sum().backward()
    return result, result.loss_BT.item(), logprobs.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, None),  # -A; d(-A r) / dlogp = -A r
        (1.0, -2.0, 2.0, 2.0, None),
        (1.1, 2.0, -2.2, -2.2, None),
        (1.5, 2.0, -2.6, 0.0, "high"),  # -1.3 * 2
        (1.5, -2.0, 3.0, 3.0, None),  # no upper clip for a negative advantage
        (0.5, -2.0, 1.6, 0.0, "low"),  # 0.8 * 2
        (0.5, 2.0, -1.0, -1.0, None),  # no lower clip for a positive advantage
        (0.9, -2.0, 1.8, 1.8, None),
        (1.25, 2.0, -2.5, -2.5, None),  # above 1 + low: the upper clip is its own
        (0.75, -2.0, 1.6, 0.0, "low"),  # within 1 - high, not within 1 - low
        (3.0, 0.0, 0.0, 0.0, None),
    ],
)
def test_clip(ratio, advantage, loss, gradient, clipped):
    result, got_loss, got_gradient = loss_at(ratio, advantage)
    assert got_loss == pytest.approx(loss, abs=1e-5)
    assert got_gradient == pytest.approx(gradient, abs=1e-5)
    assert result.ratio_BT.item() == pytest.approx(ratio, abs=1e-5)
    assert (result.clipped_low_BT.item(), result.clipped_high_BT.item()) == (clipped == "low", clipped == "high")
    assert not result.dual_clipped_BT.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "dual"),
    [
        (5.0, -2.0, 6.0, 0.0, True),  # 3 * 2 instead of 5 * 2
        (2.5, -2.0, 5.0, 5.0, False),
        (5.0, 2.0, -2.6, 0.0, False),  # positive: the ordinary upper clip
        (0.5, -2.0, 1.6, 0.0, False),
    ],
)
def test_dual_clip(ratio, advantage, loss, gradient, dual):
    result, got_loss, got_gradient = loss_at(ratio, advantage, clip_ratio_c=3.0)
    assert got_loss == pytest.approx(loss, abs=1e-5)
    assert got_gradient == pytest.approx(gradient, abs=1e-5)
    assert result.dual_clipped_BT.item() is dual


def test_weights_scale_loss_and_gradient_and_get_none():
    weights = torch.tensor([[0.5]], requires_grad=True)
    _, loss, gradient = loss_at(1.1, 2.0, weights_BT=weights)
    assert loss == pytest.approx(-1.1, abs=1e-5) and gradient == pytest.approx(-1.1, abs=1e-5)  # 0.5 * -2.2
    assert weights.grad is None


def test_on_policy_the_gradient_is_minus_the_advantage():
    logprobs = torch.tensor([[-0.3, -7.0], [-1.0, -0.01]], requires_grad=True)
    advantages = torch.tensor([[1.0, -2.0], [0.5, 0.25]])
    result = policy_loss(logprobs, logprobs, advantages, clip_ratio_low=0.2, clip_ratio_high=0.2)
    result.loss_BT.sum().backward()
    assert torch.equal(result.loss_BT, -advantages) and torch.equal(logprobs.grad, -advantages)
    assert not result.ratio_BT.requires_grad


def test_extreme_ratios_stay_finite():
    logprobs = torch.tensor([[0.0, -500.0, 0.0]], requires_grad=True)
    old, advantages = torch.tensor([[-500.0, 0.0, -500.0]]), torch.tensor([[-1.0, -1.0, 0.0]])
    result = policy_loss(logprobs, old, advantages, clip_ratio_low=0.2, clip_ratio_high=0.2)
    result.loss_BT.sum().backward()
    # exp(20) = 485165195.4; clipped low: 0.8; advantage 0: 0, where inf would have made NaN
    torch.testing.assert_close(result.loss_BT, torch.tensor([[485165195.4, 0.8, 0.0]]), rtol=1e-6, atol=0)
    assert torch.equal(logprobs.grad, torch.zeros(1, 3))


def test_importance_weights_by_hand():
    old, rollout = torch.tensor([[-1.0, -1.0, -1.0, -1.0]]), torch.tensor([[-1.0, -0.5, -1.5, -900.0]])
    # exp(0), exp(-0.5), exp(0.5), and exp(899) = inf, cut at 2
    expected = torch.tensor([[1.0, 0.6065307, 1.6487213, 2.0]])
    torch.testing.assert_close(importance_weights(old, rollout, 2.0), expected, rtol=0, atol=1e-6)
    assert not importance_weights(old.requires_grad_(), rollout, 2.0).requires_grad


def test_registry():
    assert pick(LOSSES, "algorithm.loss_type", "actor") is policy_loss
    assert isinstance(loss_at(1.0, 1.0)[0], PolicyLoss)
    with pytest.raises(ValueError, match=r"algorithm\.loss_type: 'critic' is unknown; use one of actor"):
        pick(LOSSES, "algorithm.loss_type", "critic")
