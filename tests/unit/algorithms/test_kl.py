"""KL estimators, compared with values by hand and with exact expectations."""

import math

import pytest
import torch

from rlinf_lite.algorithms.kl import corrected_kl, kl_penalty

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


def test_k3_below_the_limit_equals_a_plain_exponential():
    """Bitwise identical to exp of a clamped log-ratio, in value and gradient, wherever nothing is clamped."""
    generator = torch.Generator().manual_seed(5)
    logprobs, ref = (20 * torch.rand(4096, generator=generator) - 21 for _ in range(2))
    now, before = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    log_ratio = (ref - before).clamp(-20.0, 20.0)
    old_penalty = log_ratio.exp() - log_ratio - 1.0
    penalty = kl_penalty(now, ref, "low_var_kl")
    assert torch.equal(penalty, old_penalty)
    (penalty.sum() / 7).backward()
    (old_penalty.sum() / 7).backward()
    assert torch.equal(now.grad, before.grad)


@pytest.mark.parametrize(
    ("logprob", "ref", "value", "gradient"),
    [
        (0.0, -25.0, 24.0, 1.0),  # d = -25: exp(d) + 25 - 1, and 1 - exp(d)
        (0.0, -500.0, 499.0, 1.0),
        (-25.0, 0.0, math.exp(25) - 26, 1 - math.exp(25)),
        (-40.0, 0.0, math.exp(40) - 41, 1 - math.exp(40)),
        (-42.0, 0.0, 3 * math.exp(40) - 43, 1 - math.exp(40)),  # the tangent at 40: exp(40) * (1 + 42 - 40)
        (-500.0, 0.0, 461 * math.exp(40) - 501, 1 - math.exp(40)),
    ],
)
def test_k3_keeps_its_gradient_far_from_the_reference(logprob, ref, value, gradient):
    logprobs = torch.tensor([logprob], requires_grad=True)
    penalty = kl_penalty(logprobs, torch.tensor([ref]), "low_var_kl")
    penalty.sum().backward()
    assert penalty.item() == pytest.approx(value, rel=1e-5)
    assert logprobs.grad.item() == pytest.approx(gradient, rel=1e-5)
    assert logprobs.grad.square().isfinite().all(), "as the gradient norm needs it"


# Three distributions over five tokens, in float64: every expectation below is a sum over all of them.
POLICY = torch.tensor([0.3, -1.2, 0.9, 0.1, -0.4], dtype=torch.float64)
REFERENCE = torch.tensor([-0.2, 0.4, 0.5, -1.0, 0.3], dtype=torch.float64).log_softmax(0)
OLD = torch.tensor([0.5, 0.6, -0.3, 0.2, -1.1], dtype=torch.float64).log_softmax(0)


def expected_gradient(penalty, drawn_from=None):
    """Of a penalty's mean over tokens drawn from a distribution (None: the policy's), in the policy's logits."""
    logits = POLICY.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    weights = (logprobs.detach() if drawn_from is None else drawn_from).exp()
    (weights * penalty(logprobs)).sum().backward()
    return logits.grad


def gradient(divergence):
    """Of a function of the policy's whole distribution."""
    logits = POLICY.clone().requires_grad_()
    divergence(logits.log_softmax(0)).backward()
    return logits.grad


def kl(first, second):
    return (first.exp() * (first - second)).sum()


KL_TO_REFERENCE = gradient(lambda p: kl(p, REFERENCE))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("kl", torch.zeros(5, dtype=torch.float64)),
        ("abs", gradient(lambda p: (p.exp() - REFERENCE.exp()).abs().sum())),  # twice the total variation
        ("mse", KL_TO_REFERENCE),
        ("low_var_kl", gradient(lambda p: kl(REFERENCE, p))),
    ],
)
def test_expected_gradient_on_policy(kind, expected):
    found = expected_gradient(lambda p: kl_penalty(p, REFERENCE, kind))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["kl", "mse", "low_var_kl"])
@pytest.mark.parametrize("old", [None, OLD], ids=["on-policy", "off-policy"])
def test_the_corrected_gradient_is_that_of_kl_policy_to_reference(kind, old):
    def penalty(logprobs):
        return corrected_kl(logprobs, REFERENCE, logprobs.detach() if old is None else old, kind)

    torch.testing.assert_close(expected_gradient(penalty, old), KL_TO_REFERENCE, rtol=0, atol=1e-14)


def test_the_corrected_value_is_the_kl_of_the_policy_now():
    logprobs = POLICY.log_softmax(0)
    for kind in ("kl", "low_var_kl"):
        value = (OLD.exp() * corrected_kl(logprobs, REFERENCE, OLD, kind)).sum()
        assert value.item() == pytest.approx(kl(logprobs, REFERENCE).item(), abs=1e-14)


def test_the_corrected_gradient_is_that_of_a_differentiated_ratio_times_k3():
    """As DeepSeek-V3.2 writes it, token by token."""
    for old in (OLD, REFERENCE):
        logprobs = POLICY.log_softmax(0).requires_grad_()
        ((logprobs - old).exp() * kl_penalty(logprobs, REFERENCE, "low_var_kl")).sum().backward()
        ours = POLICY.log_softmax(0).requires_grad_()
        corrected_kl(ours, REFERENCE, old, "low_var_kl").sum().backward()
        torch.testing.assert_close(ours.grad, logprobs.grad, rtol=1e-12, atol=1e-14)


def test_off_policy_only_the_corrected_gradient_is_right():
    for kind in ("mse", "low_var_kl"):
        found = expected_gradient(lambda p, kind=kind: kl_penalty(p, REFERENCE, kind), OLD)
        assert (found - KL_TO_REFERENCE).abs().max() > 0.05


def test_tokens_that_became_unlikely_do_not_blow_up_the_corrected_gradient():
    """A later mini-batch at temperature 0.6: the policy has moved away from a token that it had often sampled."""
    at = [torch.tensor(logits, dtype=torch.float64) for logits in ([-3.0, 1.0, 2.0], [1.0, 1.0, 0.0], [1.0, 0.5, 0.2])]
    logprobs, old, ref = ((logits / 0.6).log_softmax(0) for logits in at)

    def norm(penalty):
        given = logprobs.clone().requires_grad_()
        (old.exp() * penalty(given)).sum().backward()
        return given.grad.norm().item()

    plain, mse = (norm(lambda p, kind=kind: kl_penalty(p, ref, kind)) for kind in ("low_var_kl", "mse"))
    corrected = norm(lambda p: corrected_kl(p, ref, old, "low_var_kl"))
    assert plain > 100 * mse and corrected < 2 * mse


def test_the_corrected_penalty_stays_finite():
    logprobs = torch.tensor([-500.0, 0.0, -60.0], requires_grad=True)
    ref, old = torch.tensor([0.0, -500.0, 0.0]), torch.tensor([-500.0, -500.0, 0.0])
    penalty = corrected_kl(logprobs, ref, old, "low_var_kl")
    penalty.sum().backward()
    assert penalty.isfinite().all() and logprobs.grad.square().isfinite().all()


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"algorithm\.kl_penalty_type: 'k3' is unknown; .*low_var_kl"):
        kl_penalty(LOGPROBS, REF_LOGPROBS, "k3")
