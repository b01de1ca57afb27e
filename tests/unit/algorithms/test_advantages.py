"""Group advantages and whitening, compared with values by hand."""

import math

import pytest
import torch

from rlinf_lite.algorithms import ADVANTAGES, group_advantages, left_out, over_graded, pick, whiten


def test_group_advantages_by_hand():
    # Row 1: mean 0.25, deviations 0.75, -0.25 (three times); squares 0.5625 + 3 * 0.0625 = 0.75; / (4 - 1) = 0.25;
    #        std 0.5; 0.75 / 0.500001 = 1.499997, -0.25 / 0.500001 = -0.499999
    # Row 2: mean 2, deviations -1, 1, -1, 1; squares 4; / 3; std 1.1547005; 1 / 1.1547015 = 0.8660246
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 3.0, 1.0, 3.0]]))
    row_1, row_2 = [1.499997, -0.499999, -0.499999, -0.499999], [-0.8660246, 0.8660246, -0.8660246, 0.8660246]
    expected = torch.tensor([row_1, row_2])
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -0.7, 1e6 + 0.1])
@pytest.mark.parametrize("group_size", [1, 2, 3, 7, 16])
def test_equal_rewards_give_exactly_zero(value, group_size):
    # In float64 the mean of three 0.1 is not 0.1.
    for dtype in (torch.float32, torch.float64):
        rewards = torch.full((2, group_size), value, dtype=dtype)
        assert torch.equal(group_advantages(rewards), torch.zeros(2, group_size))


def test_groups_do_not_see_each_other():
    rewards = torch.tensor([[1.0, 0.0, 1.0], [5.0, 5.0, 5.0], [0.0, 0.0, 2.0]])
    alone = torch.cat([group_advantages(row[None]) for row in rewards])
    assert torch.equal(group_advantages(rewards), alone)


def test_large_offset_is_not_lost_to_float32():
    # float32 cannot hold 1e8 + 1; std of (0, 1) is 0.7071068, 0.5 / 0.7071078 = 0.7071058
    advantages = group_advantages(torch.tensor([[1e8, 1e8 + 1]], dtype=torch.float64))
    torch.testing.assert_close(advantages, torch.tensor([[-0.7071058, 0.7071058]]), rtol=0, atol=2e-7)


def test_whiten_by_hand():
    # Tokens: 1 three times, -1 once. Mean (3 - 1) / 4 = 0.5. Variance (3 * 0.25 + 2.25) / 4 = 0.75; std 0.8660254.
    # 0.5 / 0.8660264 = 0.5773496, -1.5 / 0.8660264 = -1.7320488
    whitened = whiten(torch.tensor([1.0, -1.0]), torch.tensor([3, 1]))
    assert whitened.dtype == torch.float32
    torch.testing.assert_close(whitened, torch.tensor([0.5773496, -1.7320488]), rtol=0, atol=2e-7)


def test_whiten_leaves_mean_zero_and_std_one_over_tokens():
    num_tokens = torch.tensor([5, 1, 0, 12])
    tokens = whiten(torch.tensor([0.3, -2.0, 9.0, 1.1]), num_tokens).repeat_interleave(num_tokens).double()
    assert math.isclose(tokens.mean().item(), 0.0, abs_tol=1e-6)
    assert math.isclose(tokens.std(unbiased=False).item(), 1.0, abs_tol=1e-5)


def test_whiten_of_equal_advantages_is_exactly_zero():
    assert torch.equal(whiten(torch.tensor([0.1, 0.1, 0.1]), torch.tensor([3, 1, 7])), torch.zeros(3))
    assert torch.equal(whiten(torch.tensor([0.1, 5.0]), torch.tensor([3, 0])), torch.zeros(2))
    assert torch.equal(whiten(torch.tensor([1.0, 2.0]), torch.tensor([0, 0])), torch.zeros(2))


def test_registry():
    assert pick(ADVANTAGES, "algorithm.adv_type", "grpo") is group_advantages
    with pytest.raises(ValueError, match=r"algorithm\.adv_type: 'gae' is unknown; use one of grpo"):
        pick(ADVANTAGES, "algorithm.adv_type", "gae")


def test_a_group_with_fewer_than_two_grades_is_left_out_whole():
    graded = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]).bool()
    assert left_out(graded).tolist() == [[False] * 3, [False, True, False], [True] * 3, [True] * 3]
    assert left_out(torch.ones(2, 1).bool()).all(), "one response has nothing to be compared with"


def test_ungraded_responses_do_not_affect_their_group():
    """With rewards in [-1, 0] a 0 that stands for "no grade" would be the best of the group."""
    rewards = torch.tensor([[-1.0, -0.5, 0.0, -0.25], [0.0, -1.0, 0.0, 0.0], [-1.0, 0.0, -0.5, 0.0]])
    graded = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]]).bool()
    found = over_graded(group_advantages, rewards, left_out(graded))
    # Row 1: -1, -0.5, -0.25: mean -0.5833333; deviations -0.4166667, 0.0833333, 0.3333333; squares 0.2916667; / 2;
    #        std 0.3818813; -0.4166667 / 0.3818823 = -1.0910866, 0.2182173, 0.8728693
    expected = torch.tensor([-1.0910866, 0.2182173, 0.0, 0.8728693])
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)
    assert torch.equal(found[0, [0, 1, 3]], group_advantages(rewards[:1, [0, 1, 3]])[0])
    assert torch.equal(found[1], torch.zeros(4))
    assert torch.equal(found[2], group_advantages(rewards[2:])[0])


def test_without_failures_it_equals_the_estimator():
    rewards = torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    graded = torch.ones(64, 8).bool()
    assert torch.equal(over_graded(group_advantages, rewards, left_out(graded)), group_advantages(rewards))
