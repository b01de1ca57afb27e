"""Each estimator of advantages against numbers worked by hand, and what an algorithm makes of them."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from rlinf_lite import algorithms
from rlinf_lite.algorithms.advantages import estimator
from rlinf_lite.algorithms.algorithm import Graded
from rlinf_lite.algorithms.build import build
from rlinf_lite.algorithms.statistics import over_groups, whiten
from rlinf_lite.config import AlgorithmConfig, ConfigError
from rlinf_lite.types import Column

GROUPED = ("grpo", "dr_grpo", "rloo", "maxrl")


def graded(rewards, *, counted=None, finished=None, tokens=None, max_tokens=10, **columns):
    """Rewards [P, G]; every response counted, finished and of two loss tokens unless given."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    counted = torch.ones_like(rewards, dtype=torch.bool) if counted is None else torch.tensor(counted).bool()
    return Graded(
        rewards_PG=rewards,
        counted_PG=counted,
        finished_PG=torch.ones_like(counted) if finished is None else torch.tensor(finished).bool(),
        num_tokens_PG=(torch.full(rewards.shape, 2) if tokens is None else torch.tensor(tokens)) * counted,
        max_tokens=max_tokens,
        columns={Column(name): torch.tensor(values) for name, values in columns.items()},
    )


def credit(given, **options):
    return build(AlgorithmConfig(**options)).credit(given)


def advantages(given, **options):
    """Advantage of each loss token, as a list."""
    column = credit(given, **options).columns[Column.ADVANTAGE]
    assert column.dtype == torch.float32
    return column.tolist()


def close(*values):
    return pytest.approx(list(values), rel=1e-6, abs=1e-7)


# Rewards 1, 0, 0, 0: mean 1/4; deviations 3/4 and -1/4; squares 9/16 + 3/16 = 3/4; / 3 = 1/4; std 1/2.
BY_HAND = {
    "grpo": [0.75 / 0.500001, -0.25 / 0.500001, -0.25 / 0.500001, -0.25 / 0.500001],
    "dr_grpo": [0.75, -0.25, -0.25, -0.25],
    "rloo": [1.0, -1 / 3, -1 / 3, -1 / 3],  # 1 - 0; 0 - (1 + 0 + 0) / 3
    "maxrl": [0.75 / 0.250001, -0.25 / 0.250001, -0.25 / 0.250001, -0.25 / 0.250001],
}


@pytest.mark.parametrize("name", GROUPED)
def test_of_a_group_by_hand(name):
    given = graded([[1.0, 0.0, 0.0, 0.0]], tokens=[[1, 1, 1, 1]])
    assert advantages(given, adv_type=name) == close(*BY_HAND[name])


@pytest.mark.parametrize("name", GROUPED)
def test_of_a_group_with_an_ungraded_response(name):
    """With rewards of 1 and 0, a 0 that stands for "no grade" would change the mean."""
    given = graded([[1.0, 0.0, 0.0, 0.0, 0.0]], counted=[[1, 0, 1, 1, 1]], tokens=[[1, 3, 1, 1, 1]])
    assert advantages(given, adv_type=name) == close(*BY_HAND[name])


@pytest.mark.parametrize("name", (*GROUPED, "reinpp_baseline"))
def test_a_group_with_one_grade_is_not_trained(name):
    given = graded([[1.0, 0.0], [3.0, 5.0]], counted=[[1, 0], [1, 1]])
    made = credit(given, adv_type=name)
    assert made.trained_PG.tolist() == [[False, False], [True, True]]
    assert made.columns[Column.ADVANTAGE][:2].tolist() == [0.0, 0.0]
    assert made.columns[Column.ADVANTAGE][2:].abs().min() > 0


@pytest.mark.parametrize("name", (*GROUPED, "reinpp", "reinpp_baseline"))
def test_all_ungraded(name):
    made = credit(graded([[0.0, 0.0]], counted=[[0, 0]]), adv_type=name)
    assert not made.trained_PG.any() and made.columns[Column.ADVANTAGE].shape == (0,)


@pytest.mark.parametrize("name", (*GROUPED, "reinpp", "reinpp_baseline"))
@pytest.mark.parametrize("value", [0.1, 1e6 + 0.1])
def test_equal_rewards_give_exactly_zero(name, value):
    # In float64 the mean of three 0.1 is not 0.1.
    assert advantages(graded([[value] * 3, [value] * 3]), adv_type=name) == [0.0] * 12


def test_maxrl_without_success_is_zero_and_refuses_negative_rewards():
    assert advantages(graded([[0.0, 0.0]]), adv_type="maxrl") == [0.0] * 4
    with pytest.raises(ConfigError, match=r"algorithm\.adv_type=maxrl: .* a reward is -1; grade with rewards"):
        credit(graded([[-1.0, 1.0]]), adv_type="maxrl")
    credit(graded([[-1.0, 1.0, 0.0]], counted=[[0, 1, 1]]), adv_type="maxrl")


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("success", [0.1, 0.5, 0.9])
def test_the_expected_gradient_of_maxrl_is_the_truncated_series_of_log_s(size, success):
    """Over all outcomes of a group: log p(outcome) has the slope 1 / s for a success, -1 / (1 - s) for a failure."""
    slope = 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=size):
        weights = advantages(graded([outcome], tokens=[[1] * size]), adv_type="maxrl")
        chance = math.prod(success if reward else 1 - success for reward in outcome)
        slopes = [1 / success if reward else -1 / (1 - success) for reward in outcome]
        slope += chance * sum(weight * one for weight, one in zip(weights, slopes, strict=True)) / size
    assert slope == pytest.approx(sum((1 - success) ** term for term in range(size - 1)), rel=1e-5)


def test_reinpp_by_hand():
    # Responses of 1 and 3 tokens with rewards 1 and 0: every token's return is its response's reward, gamma being 1.
    # Over the 4 tokens: mean 1/4, variance (9/16 + 3/16) / 4 = 3/16, std 0.4330127.
    given = graded([[1.0], [0.0]], tokens=[[1], [3]])
    assert advantages(given, adv_type="reinpp") == close(0.75 / 0.4330137, *[-0.25 / 0.4330137] * 3)
    # gamma 1/2: returns 1 | 1/2, 1 of rewards 1 and 1. Mean 5/6; deviations 1/6, -1/3, 1/6; squares 1/36 + 1/9 + 1/36 =
    # 1/6; / 3 = 1/18; std 0.2357023.
    given = graded([[1.0], [1.0]], tokens=[[1], [2]])
    expected = close(1 / 6 / 0.2357033, -1 / 3 / 0.2357033, 1 / 6 / 0.2357033)
    assert advantages(given, adv_type="reinpp", gamma=0.5) == expected


def test_reinpp_with_the_kl_in_the_reward_by_hand():
    # Response 0: KL 0.2 and 0.4 (k1), beta 0.5, reward 1 at its last token: rewards -0.1, 0.8; returns 0.7, 0.8.
    # Response 1: KL -0.2, reward 0: 0.1. Mean 1.6 / 3 = 0.5333333; deviations 0.1666667, 0.2666667, -0.4333333;
    # squares 0.0277778 + 0.0711111 + 0.1877778 = 0.2866667; / 3 = 0.0955556; std 0.3091206.
    given = graded([[1.0], [0.0]], tokens=[[2], [1]], old_logprob=[-1.0, -1.0, -1.0], ref_logprob=[-1.2, -1.4, -0.8])
    options = {"adv_type": "reinpp", "kl_in_reward": True, "kl_beta": 0.5, "kl_penalty_type": "kl"}
    expected = close(0.1666667 / 0.3091216, 0.2666667 / 0.3091216, -0.4333333 / 0.3091216)
    assert advantages(given, **options) == expected
    assert credit(given, **options).metrics["advantage/kl_in_reward"] == pytest.approx(0.4 / 3, rel=1e-6)


def test_reinpp_baseline_by_hand():
    # Group 1: rewards 1, 0 -> 0.5, -0.5. Group 2: 3, 1 -> 1, -1. One token each: mean 0, std sqrt(2.5 / 4) = 0.7905694.
    given = graded([[1.0, 0.0], [3.0, 1.0]], tokens=[[1, 1], [1, 1]])
    expected = close(*(value / 0.7905704 for value in (0.5, -0.5, 1.0, -1.0)))
    assert advantages(given, adv_type="reinpp_baseline") == expected


@pytest.mark.parametrize("name", ("grpo", "dr_grpo", "rloo"))
def test_the_kl_of_a_response_is_taken_from_its_reward(name):
    options = {"adv_type": name, "kl_in_reward": True, "kl_beta": 0.5, "kl_penalty_type": "kl"}
    # KL of the responses: 0.2 + 0.4, and -0.2: rewards 1 - 0.3 and 0 + 0.1.
    kl = {"old_logprob": [-1.0, -1.0, -1.0], "ref_logprob": [-1.2, -1.4, -0.8]}
    given, equal = graded([[1.0, 0.0]], tokens=[[2, 1]], **kl), graded([[0.7, 0.1]], tokens=[[2, 1]])
    assert advantages(given, **options) == pytest.approx(advantages(equal, adv_type=name), rel=1e-5)


def test_gae_by_hand():
    # gamma 0.5, lambda 0.5, one response of three tokens, values 1, 2, 4, reward 8 at the end.
    # d_3 = 8 - 4 = 4; A_3 = 4. d_2 = 0.5 * 4 - 2 = 0; A_2 = 0 + 0.25 * 4 = 1. d_1 = 0.5 * 2 - 1 = 0; A_1 = 0.25.
    # A second response, of one token: value 3, reward 1: A = -2. Returns: A + V.
    given = graded([[8.0], [1.0]], tokens=[[3], [1]], old_value=[1.0, 2.0, 4.0, 3.0])
    made = credit(given, adv_type="gae", gamma=0.5, gae_lambda=0.5)
    assert made.columns[Column.ADVANTAGE].tolist() == [0.25, 1.0, 4.0, -2.0]
    assert made.columns[Column.RETURN].tolist() == [1.25, 3.0, 8.0, 1.0]


def test_gae_with_lambda_one_is_the_return_minus_the_value():
    given = graded([[8.0], [1.0]], tokens=[[3], [1]], old_value=[1.0, 2.0, 4.0, 3.0])
    made = credit(given, adv_type="gae")
    assert made.columns[Column.RETURN].tolist() == [8.0, 8.0, 8.0, 1.0]
    assert made.columns[Column.ADVANTAGE].tolist() == [7.0, 6.0, 4.0, -2.0]


def test_gae_normalizes_advantages_and_not_returns():
    given = graded([[8.0], [1.0]], tokens=[[3], [1]], old_value=[1.0, 2.0, 4.0, 3.0])
    made = credit(given, adv_type="gae", normalize_advantages=True)
    tokens = made.columns[Column.ADVANTAGE].double()
    assert tokens.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert tokens.std(unbiased=False).item() == pytest.approx(1.0, abs=1e-5)
    assert made.columns[Column.RETURN].tolist() == [8.0, 8.0, 8.0, 1.0]


def test_gae_trains_a_group_with_one_grade():
    given = graded([[1.0, 0.0]], counted=[[1, 0]], tokens=[[2, 5]], old_value=[0.0, 0.0])
    made = credit(given, adv_type="gae")
    assert made.trained_PG.tolist() == [[True, False]] and made.columns[Column.ADVANTAGE].tolist() == [1.0, 1.0]


def test_normalized_advantages_are_over_the_trained_tokens():
    # Tokens: 1/2 three times, -1/2 once. Mean 1/4, variance (3/16 + 9/16) / 4 = 3/16, std 0.4330127. The tokens of a
    # truncated response and of the ungraded one do not count; the reward of the truncated one does.
    options = {"adv_type": "dr_grpo", "normalize_advantages": True}
    given = graded([[1.0, 0.0]], tokens=[[3, 1]])
    assert advantages(given, **options) == close(*[0.25 / 0.4330137] * 3, -0.75 / 0.4330137)
    given = graded([[1.0, 0.0, 0.5, 9.0]], counted=[[1, 1, 1, 0]], finished=[[1, 1, 0, 1]], tokens=[[3, 1, 2, 7]])
    made = credit(given, mask_truncated=True, **options)
    assert made.columns[Column.ADVANTAGE].tolist() == close(*[0.25 / 0.4330137] * 3, -0.75 / 0.4330137, 0.0, 0.0)
    assert made.trained_PG.tolist() == [[True, True, False, False]]


def test_soft_overlong_punishment_by_hand():
    # Longest 10, buffer 4: nothing up to 6 tokens, -0.5 at 8, -1 at 10; times 3.
    options = {"adv_type": "dr_grpo", "overlong_buffer": 4, "overlong_penalty": 3.0}
    made = credit(graded([[1.0, 1.0, 1.0]], tokens=[[6, 8, 10]]), **options)
    rewards = [1.0, -0.5, -2.0]  # mean -0.5
    expected = [rewards[0] + 0.5] * 6 + [rewards[1] + 0.5] * 8 + [rewards[2] + 0.5] * 10
    assert made.columns[Column.ADVANTAGE].tolist() == close(*expected)
    assert made.metrics["reward/overlong_penalty"] == pytest.approx(-1.5)


def test_dynamic_sampling_drops_groups_without_spread():
    given = graded(
        [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.1, 0.1, 0.1], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]],
        counted=[[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 1, 0]],
        tokens=[[2, 10, 2]] * 5,
    )
    options = {"overlong_buffer": 4}  # a punished length is no spread
    dropping, keeping = (build(AlgorithmConfig(dynamic_sampling=value, **options)) for value in (True, False))
    assert dropping.admit(given).tolist() == [True, False, False, False, False]
    assert keeping.admit(given).tolist() == [True] * 5


def test_groups_do_not_see_each_other():
    rewards = [[1.0, 0.0, 1.0], [5.0, 5.0, 5.0], [0.0, 0.0, 2.0]]
    for name in GROUPED:
        together = advantages(graded(rewards), adv_type=name)
        assert together == [value for row in rewards for value in advantages(graded([row]), adv_type=name)]


def test_large_offset_is_not_lost_to_float32():
    # float32 cannot hold 1e8 + 1; std of (0, 1) is 0.7071068, 0.5 / 0.7071078 = 0.7071058
    expected = close(-0.7071058, -0.7071058, 0.7071058, 0.7071058)
    assert advantages(graded([[1e8, 1e8 + 1]]), adv_type="grpo") == expected


def test_over_groups_calls_the_function_with_counted_rewards_only():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    counted = torch.tensor([[True, False, True], [True, True, True]])
    found = over_groups(lambda rows: rows.sum(dim=1, keepdim=True).expand_as(rows), rewards, counted, at_least=3)
    assert found.tolist() == [[0.0, 0.0, 0.0], [56.0, 56.0, 56.0]]
    found = over_groups(lambda rows: rows.sum(dim=1, keepdim=True).expand_as(rows), rewards, counted, at_least=2)
    assert found[0].tolist() == [5.0, 0.0, 5.0]


def test_whitening_without_spread_or_tokens():
    values = torch.tensor([0.1, 0.1, 7.0], dtype=torch.float64)
    assert whiten(values, torch.tensor([True, True, False])).tolist() == [0.0, 0.0, 0.0]
    assert whiten(values, torch.zeros(3).bool()).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({}, set()),
        ({"n_minibatches": 2}, {"old_logprob"}),
        ({"recompute_logprobs": False}, {"old_logprob"}),
        ({"kl_beta": 0.1}, {"ref_logprob"}),
        ({"kl_beta": 0.1, "kl_in_reward": True}, {"ref_logprob", "old_logprob"}),
        ({"importance_sampling_fix": True}, {"engine_logprob"}),
        ({"adv_type": "gae"}, {"old_value"}),
    ],
)
def test_what_is_needed(options, needs):
    algorithm = build(AlgorithmConfig(**options))
    assert algorithm.needs == {Column(name) for name in needs}
    assert (algorithm.losses().critic is not None) == (options.get("adv_type") == "gae")


@pytest.mark.parametrize(("key", "directory"), [("adv_type", "advantages"), ("loss_type", "losses")])
def test_each_value_of_the_key_has_its_module_and_its_section_in_the_docs(key, directory):
    package = Path(algorithms.__file__).parent
    names = set(get_args(AlgorithmConfig.model_fields[key].annotation))
    assert names == {file.stem for file in (package / directory).glob("*.py")} - {"__init__"}
    page = (package.parents[1] / "docs" / "algorithms.md").read_text()
    section = page.partition(f"\n## {directory.capitalize()}\n")[2].partition("\n## ")[0]
    assert names == set(re.findall(r"^### `(\w+)`$", section, re.MULTILINE))


def test_a_group_is_compared_from_two_grades_on():
    compared = {*GROUPED, "reinpp_baseline"}
    names = get_args(AlgorithmConfig.model_fields["adv_type"].annotation)
    assert {name for name in names if estimator(name).MIN_GRADED == 2} == compared
