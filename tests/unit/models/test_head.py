"""Log-probs and entropies from hidden states, compared with values by hand, with autograd, and bit by bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from rlinf_lite.models import head
from rlinf_lite.models.head import PLAIN, LogitTransform, token_stats

pytestmark = pytest.mark.usefixtures("one_thread")

EYE = torch.eye(3)
HIDDEN = torch.tensor([[math.log(1.0), math.log(2.0), math.log(5.0)], [0.0, 0.0, 0.0]])  # p: 1/8 2/8 5/8; 1/3 each
HALF = (torch.float32, torch.bfloat16, torch.float16)
TRANSFORMS = [PLAIN, LogitTransform(scale=0.25), LogitTransform(softcap=1.5)]


def case(num=23, dtype=torch.float32, size=9, vocab=17, bias=False):
    torch.manual_seed(3)
    hidden, weight = torch.randn(num, size).to(dtype), torch.randn(vocab, size).to(dtype)
    return hidden, weight, torch.randn(vocab).to(dtype) if bias else None, torch.randint(0, vocab, (num,))


def weights_of(num):
    torch.manual_seed(4)
    return torch.randn(num), torch.randn(num)


def autograd_stats(hidden, weight, bias, targets, temperature, transform=PLAIN):
    """Plain operations; an impossible token adds nothing."""
    logits = transform(functional.linear(hidden, weight, bias))
    logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)
    entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), entropy


def gradients(stats, tensors, of_entropy=True):
    """Of a weighted sum of log-probs and, if asked for, entropies: with respect to hidden states, weight and bias."""
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in tensors]
    logprob, entropy = stats(*leaves)
    one, other = weights_of(len(logprob))
    loss = (logprob * one).sum() + ((entropy * other).sum() if of_entropy else 0.0)
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])


def test_by_hand():
    # log(5/8) = -0.4700036, log(1/3) = -1.0986123; 1/8 log 8 + 2/8 log 4 + 5/8 log(8/5) = 0.9002561
    logprob, entropy = token_stats(HIDDEN, EYE, None, torch.tensor([2, 0]), 1.0, with_entropy=True)
    torch.testing.assert_close(logprob, torch.tensor([-0.4700036, -1.0986123]), rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy, torch.tensor([0.9002561, 1.0986123]), rtol=0, atol=1e-6)


def test_temperature_by_hand():
    # Temperature 0.5 squares the odds: 1, 4, 25 of 30; 1/30 log 30 + 4/30 log 7.5 + 25/30 log 1.2 = 0.5339616
    logprob, entropy = token_stats(HIDDEN, EYE, None, torch.tensor([1, 0]), 0.5, with_entropy=True)
    torch.testing.assert_close(logprob, torch.tensor([-2.0149030, -1.0986123]), rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy, torch.tensor([0.5339616, 1.0986123]), rtol=0, atol=1e-6)


def test_gradients_by_hand():
    hidden, weight = HIDDEN.clone().requires_grad_(), EYE.clone().requires_grad_()
    logprob, _ = token_stats(hidden, weight, None, torch.tensor([2, 0]), 1.0, with_entropy=False)
    logprob[0].backward()
    # (is target) - p: -1/8, -2/8, 1 - 5/8; the other token is not asked for
    expected = torch.tensor([-0.125, -0.25, 0.375])
    torch.testing.assert_close(hidden.grad, torch.stack([expected, torch.zeros(3)]), rtol=0, atol=1e-6)
    torch.testing.assert_close(weight.grad, expected[:, None] * HIDDEN[0], rtol=0, atol=1e-6)


def test_softcap_and_scale_by_hand():
    # 2 tanh(0.5 / 2) = 0.4898373, and of 0: 0; log softmax: -0.4779260; scaled: 0.1 * 3 = 0.3: -0.5543552
    hidden, weight, target = torch.tensor([[0.5, 0.0]]), torch.eye(2), torch.tensor([0])
    capped, _ = token_stats(
        hidden, weight, None, target, 1.0, with_entropy=False, transform=LogitTransform(softcap=2.0)
    )
    scaled, _ = token_stats(
        hidden * 0.2, weight, None, target, 1.0, with_entropy=False, transform=LogitTransform(scale=3.0)
    )
    assert capped.item() == pytest.approx(-0.4779260, abs=1e-6)
    assert scaled.item() == pytest.approx(-0.5543552, abs=1e-6)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("limit", [1, 1 << 24])
def test_gradcheck_in_float64(monkeypatch, temperature, transform, limit):
    monkeypatch.setattr(head, "MAX_ELEMENTS", limit)
    hidden, weight, bias, targets = case(6, torch.float64, size=4, vocab=5, bias=True)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    for entropy in (True, False):

        def stats(hidden, weight, bias, entropy=entropy):
            found = token_stats(hidden, weight, bias, targets, temperature, with_entropy=entropy, transform=transform)
            return found if entropy else found[0]

        assert torch.autograd.gradcheck(stats, leaves)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 3e-6), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)],
)
def test_values_and_gradients_equal_autograds(dtype, tolerance, bias, transform):
    """Gradients relative to their largest element. The other side computes in the same types."""
    *tensors, targets = case(dtype=dtype, bias=bias)

    def ours(*leaves):
        return token_stats(*leaves, targets, 0.7, with_entropy=True, transform=transform)

    def theirs(*leaves):
        return autograd_stats(*leaves, targets, 0.7, transform)

    for one, other in zip(ours(*tensors), theirs(*tensors), strict=True):
        assert one.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(one, other, rtol=1e-14 if dtype == torch.float64 else 1e-6, atol=0)
    found, expected = gradients(ours, tensors), gradients(theirs, tensors)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("limit", [1, 17 * 5, 1 << 24])
def test_an_entropy_that_no_loss_uses_changes_no_bit(monkeypatch, dtype, limit):
    monkeypatch.setattr(head, "MAX_ELEMENTS", limit)
    *tensors, targets = case(dtype=dtype)
    alone, together = (
        lambda *leaves, entropy=entropy: token_stats(*leaves, targets, 0.8, with_entropy=entropy)
        for entropy in (False, True)
    )
    assert alone(*tensors)[1] is None
    assert torch.equal(alone(*tensors)[0], together(*tensors)[0])
    one, other = (gradients(stats, tensors, of_entropy=False) for stats in (alone, together))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("limit", [1, 17 * 5, 17 * 7, 17 * 22, 1 << 24])
def test_the_chunk_size_changes_no_bit_of_a_tokens_values(monkeypatch, dtype, limit):
    """Not in float64, where the products of a CPU round by how many rows there are, however many those are."""
    *tensors, targets = case(dtype=dtype, vocab=17)
    expected = token_stats(*tensors, targets, 0.8, with_entropy=True)
    monkeypatch.setattr(head, "MAX_ELEMENTS", limit)
    found = token_stats(*tensors, targets, 0.8, with_entropy=True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", HALF)
def test_a_token_does_not_depend_on_its_neighbours(dtype):
    hidden, weight, _, targets = case(dtype=dtype)
    together = token_stats(hidden, weight, None, targets, 0.9, with_entropy=True)
    for m in range(len(hidden)):
        alone = token_stats(hidden[m : m + 1], weight, None, targets[m : m + 1], 0.9, with_entropy=True)
        assert all(torch.equal(one, other[m : m + 1]) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("entropy", [False, True])
def test_logits_kept_or_computed_again_give_the_same_gradients(monkeypatch, entropy):
    """Of tokens that are all in one chunk the logits are kept; with a few more, in another chunk, they are not."""
    hidden, weight, _, targets = case(12)
    extra, more = torch.cat([hidden, hidden[:3]]), torch.cat([targets, targets[:3]])
    monkeypatch.setattr(head, "MAX_ELEMENTS", 12 * 17)

    def gradient(hidden, targets):
        leaf = hidden.clone().requires_grad_()
        logprob, entropy_M = token_stats(leaf, weight, None, targets, 0.8, with_entropy=entropy)
        loss = logprob[:12].square().sum() + (entropy_M[:12].square().sum() if entropy else 0.0)
        return torch.autograd.grad(loss, leaf)[0]

    assert torch.equal(gradient(hidden, targets), gradient(extra, more)[:12])


def test_the_weights_gradient_is_added_up_in_float32(monkeypatch):
    """4096 equal contributions in bf16 would stop growing at 256 times the first one."""
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    monkeypatch.setattr(head, "MAX_ELEMENTS", 8)  # four tokens
    logprob, _ = token_stats(hidden, weight, None, torch.zeros(4096, dtype=torch.int64), 1.0, with_entropy=False)
    logprob.sum().backward()
    assert weight.grad.tolist() == [[2048.0], [-2048.0]]  # 1 - 1/2 each


def test_the_entropy_alone_has_a_gradient():
    hidden, weight, _, targets = case()
    leaves = [[tensor.clone().requires_grad_() for tensor in (hidden, weight)] for _ in range(2)]
    token_stats(*leaves[0], None, targets, 1.0, with_entropy=True)[1].sum().backward()
    autograd_stats(*leaves[1], None, targets, 1.0)[1].sum().backward()
    for one, other in zip(*leaves, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", [1, 1 << 24])
def test_impossible_tokens_get_no_gradient_and_spoil_no_other(monkeypatch, limit):
    monkeypatch.setattr(head, "MAX_ELEMENTS", limit)
    hidden, weight, bias, targets = case(vocab=9, bias=True)
    few, targets = [0, 1, 6, 7, 8], targets % 2
    masked = bias.clone()
    masked[2:6] = -torch.inf

    def stats(*leaves):
        return token_stats(*leaves, targets, 0.7, with_entropy=True)

    found = gradients(stats, (hidden, weight, masked))
    expected = gradients(stats, (hidden, weight[few], bias[few]))
    assert (found[1][2:6] == 0).all() and (found[2][2:6] == 0).all()
    for one, other in zip((found[0], found[1][few], found[2][few]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("entropy", [False, True])
def test_without_tokens_the_gradients_are_zeros(entropy):
    hidden, weight, bias, targets = case(0, bias=True)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    logprob, entropy_M = token_stats(*leaves, targets, 1.0, with_entropy=entropy)
    assert logprob.shape == (0,) and (entropy_M.shape == (0,) if entropy else entropy_M is None)
    logprob.sum().backward()
    assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in leaves)


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, bias, targets = case(bias=True)
    for frozen in range(3):
        leaves = [tensor.clone().requires_grad_(i != frozen) for i, tensor in enumerate((hidden, weight, bias))]
        token_stats(*leaves, targets, 1.0, with_entropy=True)[0].sum().backward()
        assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(3)]


def test_a_vocabulary_of_one_token():
    hidden, weight, _, targets = case(vocab=1)
    leaf = hidden.requires_grad_()
    logprob, entropy = token_stats(leaf, weight, None, targets, 0.5, with_entropy=True)
    assert (logprob == 0).all() and (entropy == 0).all()
    (logprob + entropy).sum().backward()
    assert (leaf.grad == 0).all()


def test_nothing_of_the_size_of_all_logits_is_kept(monkeypatch):
    """Tensors that autograd keeps: the inputs, int64 targets and a float32 entropy per token."""
    monkeypatch.setattr(head, "MAX_ELEMENTS", 8 * 1024)
    monkeypatch.setattr(head, "MAX_KEPT_BYTES", 8 * 1024 * 4 - 1)
    hidden, weight, _, targets = case(64, vocab=1024)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logprob, entropy = token_stats(*leaves, None, targets, 1.0, with_entropy=True)
    assert logprob.requires_grad and entropy.requires_grad
    assert sum(kept.values()) == 4 * (hidden.numel() + weight.numel()) + 64 * (8 + 4)
