"""Log-probs and entropies, compared with values by hand and with autograd."""

import math

import pytest
import torch

from rlinf_lite.algorithms import logprobs as module
from rlinf_lite.algorithms import token_logprobs, token_logprobs_and_entropy

LOGITS = torch.tensor([[[math.log(1.0), math.log(2.0), math.log(5.0)], [0.0, 0.0, 0.0]]])  # p: 1/8 2/8 5/8; 1/3 each


def autograd_logprobs(logits, targets, temperature):
    return torch.log_softmax(logits.float() / temperature, dim=-1).gather(-1, targets[..., None]).squeeze(-1)


def token_entropy(logits, temperature):
    return token_logprobs_and_entropy(logits, torch.zeros(logits.shape[:2], dtype=torch.int64), temperature)[1]


def autograd_entropy(logits, temperature):
    """Plain operations; an impossible token adds nothing."""
    logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1)


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


# -- the analytic derivative of both together


def random_case(dtype=torch.float32, num_logits=17, scale=3.0):
    torch.manual_seed(5)
    logits = (torch.randn(3, 4, num_logits) * scale).to(dtype)
    return logits, torch.randint(0, num_logits, (3, 4)), torch.randn(3, 4), torch.randn(3, 4)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_gradcheck_in_float64(temperature):
    logits, targets, *_ = random_case(torch.float64, num_logits=6)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: token_logprobs_and_entropy(z, targets, temperature), [logits])
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, targets, temperature), [logits])
    assert token_logprobs(logits, targets, temperature).dtype == torch.float64


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("num_logits", [1, 2, 17, 4099])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 4e-3)]
)
def test_gradient_of_both_equals_autograds(dtype, tolerance, num_logits, temperature):
    """Relative to the largest element. In bf16 one rounding of the sum; autograd rounds both terms and the sum."""
    logits, targets, of_logprobs, of_entropy = random_case(dtype, num_logits)
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(ours, targets, temperature)
    (logprobs * of_logprobs + entropy * of_entropy).sum().backward()
    expected = torch.log_softmax(exact / temperature, -1).gather(-1, targets[..., None]).squeeze(-1)
    (expected * of_logprobs + autograd_entropy(exact, temperature) * of_entropy).sum().backward()
    assert ours.grad.dtype == dtype
    assert (ours.grad - exact.grad).abs().max() <= tolerance * max(exact.grad.abs().max(), 1e-30)


def test_values_and_the_gradient_without_bonus_keep_their_bits():
    """Neither an entropy that is only logged, nor one that is asked for, changes what the log-probs are."""
    for dtype in (torch.float32, torch.bfloat16):
        logits, targets, weights, _ = random_case(dtype, num_logits=301)
        plain, logged = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        alone = token_logprobs(plain, targets, 0.8)
        together, entropy = token_logprobs_and_entropy(logged, targets, 0.8)
        assert torch.equal(alone, together) and torch.equal(entropy, autograd_entropy(logits, 0.8))
        (alone * weights).sum().backward()
        (together * weights).sum().backward()
        assert torch.equal(plain.grad, logged.grad)


def test_the_entropy_alone_has_a_gradient():
    logits, targets, _, weights = random_case()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (token_logprobs_and_entropy(ours, targets, 1.0)[1] * weights).sum().backward()
    (autograd_entropy(theirs, 1.0) * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_impossible_tokens_get_no_gradient_and_spoil_no_other():
    logits, targets, of_logprobs, of_entropy = random_case(num_logits=9)
    masked = logits.clone()
    masked[..., 2:6] = -torch.inf
    targets = torch.where((targets >= 2) & (targets < 6), 0, targets)
    few = masked[..., [0, 1, 6, 7, 8]].clone().requires_grad_()
    masked.requires_grad_()
    fewer_targets = torch.where(targets >= 6, targets - 4, targets)
    for case, wanted in ((masked, targets), (few, fewer_targets)):
        logprobs, entropy = token_logprobs_and_entropy(case, wanted, 0.7)
        (logprobs * of_logprobs + entropy * of_entropy).sum().backward()
    assert (masked.grad[..., 2:6] == 0).all()
    torch.testing.assert_close(masked.grad[..., [0, 1, 6, 7, 8]], few.grad, rtol=1e-5, atol=1e-7)


def test_a_vocabulary_of_one_token():
    logits = torch.full((2, 3, 1), 4.0, requires_grad=True)
    logprobs, entropy = token_logprobs_and_entropy(logits, torch.zeros(2, 3, dtype=torch.int64), 0.5)
    assert (logprobs == 0).all() and (entropy == 0).all()
    (logprobs + entropy).sum().backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [1, 301, 5 * 301, 10**9])
def test_the_block_size_changes_no_bit(monkeypatch, dtype, limit):
    logits, targets, of_logprobs, of_entropy = random_case(dtype, num_logits=301)

    def all_of_it():
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = token_logprobs_and_entropy(leaf, targets, 0.8)
        (logprobs * of_logprobs + entropy * of_entropy).sum().backward()
        return logprobs.detach(), entropy.detach(), leaf.grad

    expected = all_of_it()
    monkeypatch.setattr(module, "MAX_ELEMENTS", limit)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(all_of_it(), expected, strict=True))


# -- memory kept for the backward pass


def kept_bytes_per_logit(loss_of, dtype) -> float:
    """Bytes of all tensors that autograd keeps besides the logits, per logit."""
    logits = torch.randn(4, 8, 1024, dtype=dtype).requires_grad_()
    kept: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() != logits.untyped_storage().data_ptr():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = loss_of(logits, torch.randint(0, 1024, (4, 8)))  # held, or its memory would be counted twice
    assert loss.requires_grad
    return sum(kept.values()) / logits.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_the_logits_is_kept(dtype):
    """Autograd's own entropy keeps 13 bytes per logit: log p, p and their finite values in float32, and a mask."""

    def both(logits, targets):
        logprobs, entropy = token_logprobs_and_entropy(logits, targets, 1.0)
        return (logprobs - 0.001 * entropy).mean()

    assert 12.9 < kept_bytes_per_logit(lambda logits, _: autograd_entropy(logits, 1.0).mean(), dtype) < 13.1
    # int64 targets and a float32 entropy per token of 1,024 logits
    assert kept_bytes_per_logit(both, dtype) <= 12 / 1024 + 1e-9
    assert kept_bytes_per_logit(lambda *given: token_logprobs(*given, 1.0).mean(), dtype) <= 8 / 1024 + 1e-9
