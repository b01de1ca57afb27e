"""KL estimators against numbers worked out by hand."""

import pytest
import torch

from rlinf_lite.algorithms import kl_penalty

LOGPROBS, REF_LOGPROBS = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -3.0])  # policy - ref: 0.5, -1, 0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("kl", [0.5, -1.0, 0.0]),
        ("abs", [0.5, 1.0, 0.0]),
        ("mse", [0.125, 0.5, 0.0]),  # 0.5 * 0.5^2, 0.5 * 1^2
        # exp(-0.5) + 0.5 - 1 = 0.6065307 - 0.5; exp(1) - 1 - 1 = 0.7182818
        ("low_var_kl", [0.1065307, 0.7182818, 0.0]),
    ],
)
def test_values(kind, expected):
    torch.testing.assert_close(kl_penalty(LOGPROBS, REF_LOGPROBS, kind), torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("kl", [1.0, 1.0, 1.0]),
        ("abs", [1.0, -1.0, 0.0]),
        ("mse", [0.5, -1.0, 0.0]),
        ("low_var_kl", [0.3934693, -1.7182818, 0.0]),  # 1 - exp(ref - logprob)
    ],
)
def test_gradients_flow_to_the_policy(kind, expected):
    logprobs = LOGPROBS.clone().requires_grad_()
    kl_penalty(logprobs, REF_LOGPROBS, kind).sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor(expected), rtol=0, atol=1e-6)


def test_k3_estimates_kl_of_policy_to_reference():
    """The expectation under the policy is KL(policy || reference), and not the other way round."""
    policy, reference = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    estimate = (policy * kl_penalty(policy.log(), reference.log(), "low_var_kl")).sum()
    # 0.9 log 1.8 + 0.1 log 0.2 = 0.5290080 - 0.1609438; the reverse would be 0.5108256
    assert estimate.item() == pytest.approx(0.3680642, abs=1e-6)


def test_k3_stays_finite():
    logprobs = torch.tensor([-500.0, 0.0], requires_grad=True)
    penalty = kl_penalty(logprobs, torch.tensor([0.0, -500.0]), "low_var_kl")
    penalty.sum().backward()
    # log-ratio clamped to 20 and -20: exp(20) - 21 = 485165174.4, exp(-20) + 19 = 19
    torch.testing.assert_close(penalty, torch.tensor([485165174.4, 19.0]), rtol=1e-6, atol=0)
    assert torch.equal(logprobs.grad, torch.zeros(2))


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"algorithm\.kl_penalty_type: 'k3' is unknown; .*low_var_kl"):
        kl_penalty(LOGPROBS, REF_LOGPROBS, "k3")
