"""Loss aggregation: values by hand, and micro-batches that add up to the mini-batch."""

import pytest
import torch

from rlinf_lite.algorithms import aggregate

LOSS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 50.0, 60.0], [7.0, 8.0, 90.0]])
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
KINDS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token-mean", 25.0 / 6),  # (6 + 4 + 15) / 6 tokens
        ("seq-mean-token-sum", 25.0 / 3),  # (6 + 4 + 15) / 3 rows
        ("seq-mean-token-mean", 13.5 / 3),  # (2 + 4 + 7.5) / 3 rows
    ],
)
def test_by_hand(kind, expected):
    value = aggregate(LOSS, MASK, kind, 6, 3)
    assert value.shape == () and value.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_unequal_micro_batches_add_up_to_the_whole(kind):
    torch.manual_seed(0)
    loss, mask = torch.randn(7, 9), (torch.rand(7, 9) < 0.5).float()
    mask[3] = 0.0
    num_tokens = int(mask.sum())
    whole, parts = loss.clone().requires_grad_(), loss.clone().requires_grad_()
    value = aggregate(whole, mask, kind, num_tokens, 7)
    rows = [slice(0, 1), slice(1, 5), slice(5, 7)]
    contributions = [aggregate(parts[row], mask[row], kind, num_tokens, 7) for row in rows]
    assert all(part.item() != 0 for part in contributions)
    torch.testing.assert_close(torch.stack(contributions).sum(), value)
    value.backward()
    for part in contributions:
        part.backward()
    assert torch.equal(whole.grad, parts.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_positions_do_not_leak(kind):
    poisoned = torch.where(MASK > 0, LOSS, torch.tensor([torch.nan, torch.inf, -torch.inf])).requires_grad_()
    value = aggregate(poisoned, MASK, kind, 6, 3)
    assert torch.equal(value, aggregate(LOSS, MASK, kind, 6, 3))
    value.backward()
    assert torch.equal(poisoned.grad == 0, MASK == 0) and poisoned.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_tokens_adds_nothing(kind):
    loss, mask = torch.cat([LOSS, LOSS[:1]]), torch.cat([MASK, torch.zeros(1, 3)])
    assert torch.equal(aggregate(loss, mask, kind, 6, 3), aggregate(LOSS, MASK, kind, 6, 3))
    assert aggregate(LOSS, torch.zeros(3, 3), kind, 0, 3).item() == 0.0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token-mean", [[1 / 6] * 3, [1 / 6, 0, 0], [1 / 6, 1 / 6, 0]]),
        ("seq-mean-token-sum", [[1 / 3] * 3, [1 / 3, 0, 0], [1 / 3, 1 / 3, 0]]),
        ("seq-mean-token-mean", [[1 / 9] * 3, [1 / 3, 0, 0], [1 / 6, 1 / 6, 0]]),
    ],
)
def test_gradients_by_hand(kind, expected):
    loss = LOSS.clone().requires_grad_()
    aggregate(loss, MASK, kind, 6, 3).backward()
    torch.testing.assert_close(loss.grad, torch.tensor(expected))


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"algorithm\.loss_agg_func: 'mean' is unknown; .*token-mean"):
        aggregate(LOSS, MASK, "mean", 6, 3)
