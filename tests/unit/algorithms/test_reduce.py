"""Sums per response, discounted sums and the reduction of a loss: numbers by hand, gradients, splits, empty cases."""

from __future__ import annotations

import pytest
import torch

from rlinf_lite.algorithms.reduce import REDUCTIONS, Reduction, Responses, discounted_sums
from rlinf_lite.types import Normalizers

# Responses of 3, 0, 1 and 2 loss tokens.
SEQ = torch.tensor([0, 0, 0, 2, 3, 3])
VALUES = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.float64)


def test_sums_and_means_by_hand():
    responses = Responses(SEQ, 4)
    assert responses.num_tokens_R.tolist() == [3, 0, 1, 2]
    assert responses.sums(VALUES).tolist() == [7.0, 0.0, 8.0, 48.0]
    assert responses.means(VALUES).tolist() == [7.0 / 3, 0.0, 8.0, 24.0]
    assert responses.is_last_M.tolist() == [False, False, True, True, False, True]
    assert responses.of_tokens(torch.tensor([5.0, 6.0, 7.0, 8.0])).tolist() == [5.0, 5.0, 5.0, 7.0, 8.0, 8.0]
    padded = responses.padded(VALUES)
    assert padded.tolist() == [[1, 2, 4], [0, 0, 0], [8, 0, 0], [16, 32, 0]]
    assert torch.equal(responses.flat(padded), VALUES)
    assert torch.equal(Responses.of_lengths(torch.tensor([3, 0, 1, 2])).seq_M, SEQ)


def test_without_tokens_everything_is_zero():
    for num_responses in (0, 2):
        responses = Responses(torch.zeros(0, dtype=torch.long), num_responses)
        empty = torch.zeros(0, dtype=torch.float64, requires_grad=True)
        assert responses.sums(empty).tolist() == [0.0] * num_responses
        assert discounted_sums(empty, 0.5, responses).shape == (0,)
        for kind in REDUCTIONS:
            loss = Reduction(kind=kind, max_tokens=8)(empty, responses, Normalizers(num_tokens=0, num_sequences=0))
            loss.backward()
            assert loss.item() == 0.0


def test_discounted_sums_by_hand():
    # Response 0: 4; 2 + 4 / 2 = 4; 1 + 4 / 2 = 3. Response 2: 8. Response 3: 32; 16 + 32 / 2 = 32.
    assert discounted_sums(VALUES, 0.5, Responses(SEQ, 4)).tolist() == [3.0, 4.0, 4.0, 8.0, 32.0, 32.0]
    assert discounted_sums(VALUES, 1.0, Responses(SEQ, 4)).tolist() == [7.0, 6.0, 4.0, 8.0, 48.0, 32.0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token-mean", 63.0 / 6),
        ("seq-mean-token-sum", 63.0 / 3),  # three responses have loss tokens
        ("seq-mean-token-mean", (7.0 / 3 + 8.0 + 24.0) / 3),
        ("seq-mean-token-sum-norm", 63.0 / 3 / 10),
    ],
)
def test_reductions_by_hand(kind, expected):
    norm = Normalizers(num_tokens=6, num_sequences=3)
    loss = Reduction(kind=kind, max_tokens=10)(VALUES, Responses(SEQ, 4), norm)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_gradients_are_those_of_finite_differences(kind):
    norm = Normalizers(num_tokens=6, num_sequences=3)
    values = VALUES.clone().requires_grad_()
    reduction = Reduction(kind=kind, max_tokens=10)
    assert torch.autograd.gradcheck(lambda x: reduction(x.square(), Responses(SEQ, 4), norm), values)


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_units_add_up_to_the_whole_however_responses_are_split(kind):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 1, 7, 0, 2, 5])
    values = torch.randn(int(lengths.sum()), generator=generator, dtype=torch.float64)
    norm, reduction = Normalizers(num_tokens=18, num_sequences=5), Reduction(kind=kind, max_tokens=10)
    whole = reduction(values, Responses.of_lengths(lengths), norm)
    for sizes in ([1, 5], [2, 2, 2], [1, 1, 1, 1, 1, 1], [4, 2]):
        parts = values.split([int(part.sum()) for part in lengths.split(sizes)])
        units = [
            reduction(part, Responses.of_lengths(numbers), norm)
            for part, numbers in zip(parts, lengths.split(sizes), strict=True)
        ]
        torch.testing.assert_close(sum(units), whole, rtol=1e-12, atol=1e-12)


def test_the_sum_of_a_response_has_one_order():
    """Bitwise identical when repeated, with gradients, in torch's strict deterministic mode."""
    torch.use_deterministic_algorithms(True)
    try:
        lengths = torch.randint(0, 50, (64,), generator=torch.Generator().manual_seed(1))
        responses = Responses.of_lengths(lengths)
        values = torch.randn(int(lengths.sum()), generator=torch.Generator().manual_seed(2)).requires_grad_()
        found = []
        for _ in range(3):
            values.grad = None
            sums = responses.sums(values)
            sums.square().sum().backward()
            found.append((sums.detach(), values.grad))
        assert all(torch.equal(*pair) for pair in zip(found[0] * 2, found[1] + found[2], strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
