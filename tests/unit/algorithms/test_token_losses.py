"""Token losses, importance weights and the value loss: numbers by hand, gradients, splits into units, empty units."""

from __future__ import annotations

from itertools import accumulate
from typing import get_args

import pytest
import torch

from rlinf_lite.algorithms.algorithm import LossInputs, combine
from rlinf_lite.algorithms.losses import token_loss
from rlinf_lite.algorithms.losses.actor_critic import ValueLoss
from rlinf_lite.algorithms.mismatch import importance_weights
from rlinf_lite.algorithms.objective import PolicyLoss
from rlinf_lite.algorithms.reduce import REDUCTIONS, Responses
from rlinf_lite.config import AlgorithmConfig
from rlinf_lite.types import Column, Normalizers

POLICY_LOSSES = get_args(AlgorithmConfig.model_fields["loss_type"].annotation)


def loss_at(ratio, advantage, **options):
    """Loss and its gradient by the log-prob for one token with this ratio, and the metrics; clips 0.2 and 0.3."""
    logprob = (torch.tensor([-1.0]) + torch.tensor(ratio).log()).requires_grad_()
    outputs = policy_loss(clip_ratio_low=0.2, clip_ratio_high=0.3, **options)(
        inputs(logprob, torch.tensor([-1.0]), torch.tensor([advantage]), [1])
    )
    outputs.loss.backward()
    return outputs.loss.item(), logprob.grad.item(), {name: total.item() for name, total in outputs.token_sums.items()}


def policy_loss(**options):
    config = AlgorithmConfig(**options)
    return PolicyLoss(token_loss(config.loss_type), config)


def inputs(logprob, old, advantage, lengths, norm=None, **more):
    """Inputs of responses with these lengths; of the whole mini-batch unless ``norm`` is given."""
    responses = Responses.of_lengths(torch.tensor(lengths))
    entropy = more.pop("entropy", None)
    columns = {Column.OLD_LOGPROB: old, Column.ADVANTAGE: advantage, **{Column(name): more[name] for name in more}}
    return LossInputs(
        logprob_M=logprob,
        entropy_M=entropy,
        columns=columns,
        seq_M=responses.seq_M,
        num_responses=len(lengths),
        norm=norm or Normalizers(num_tokens=sum(lengths), num_sequences=sum(length > 0 for length in lengths)),
    )


@pytest.mark.parametrize("loss_type", ("actor", "actor_critic", "gspo"))  # one token: its ratio is its response's
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, False),  # -A; d(-A r) / dlogp = -A r
        (1.0, -2.0, 2.0, 2.0, False),
        (1.1, 2.0, -2.2, -2.2, False),
        (1.5, 2.0, -2.6, 0.0, True),  # -1.3 * 2
        (1.5, -2.0, 3.0, 3.0, False),  # no upper clip for a negative advantage
        (0.5, -2.0, 1.6, 0.0, True),  # 0.8 * 2
        (0.5, 2.0, -1.0, -1.0, False),  # no lower clip for a positive advantage
        (0.9, -2.0, 1.8, 1.8, False),
        (1.25, 2.0, -2.5, -2.5, False),  # above 1 + low: the upper clip is its own
        (0.75, -2.0, 1.6, 0.0, True),  # within 1 - high, not within 1 - low
        (3.0, 0.0, 0.0, 0.0, False),
    ],
)
def test_clip(loss_type, ratio, advantage, loss, gradient, clipped):
    got_loss, got_gradient, metrics = loss_at(ratio, advantage, loss_type=loss_type)
    assert got_loss == pytest.approx(loss, abs=1e-5)
    assert got_gradient == pytest.approx(gradient, abs=1e-5)
    assert metrics["policy/ratio"] == pytest.approx(ratio, abs=1e-5)
    assert (metrics["policy/clip_fraction"], metrics["policy/dual_clip_fraction"]) == (float(clipped), 0.0)


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
    got_loss, got_gradient, metrics = loss_at(ratio, advantage, clip_ratio_c=3.0)
    assert got_loss == pytest.approx(loss, abs=1e-5)
    assert got_gradient == pytest.approx(gradient, abs=1e-5)
    assert metrics["policy/dual_clip_fraction"] == float(dual)


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"), [(1.1, 2.0, 1.1), (1.5, 2.0, 1.3), (1.5, -2.0, 1.3), (0.5, -2.0, 0.8)]
)
def test_cispo_by_hand(ratio, advantage, weight):
    """-w A log p: a clipped token keeps its gradient."""
    loss, gradient, metrics = loss_at(ratio, advantage, loss_type="cispo")
    assert gradient == pytest.approx(-weight * advantage, abs=1e-5)
    logprob = -1.0 + torch.tensor(ratio).log().item()
    assert loss == pytest.approx(-weight * advantage * logprob, abs=1e-5)
    assert metrics["policy/clip_fraction"] == float(weight != ratio)


def test_cispo_has_a_lower_clip_only_if_it_is_set():
    logprob = torch.tensor([-1.0]).requires_grad_()
    policy_loss(loss_type="cispo")(inputs(logprob, torch.tensor([0.0]), torch.ones(1), [1])).loss.backward()
    assert logprob.grad.item() == pytest.approx(-0.3678794, abs=1e-6)  # exp(-1)


def test_sapo_by_hand():
    # ratio 2, A 1, tau 1: gate sigmoid(1) = 0.7310586; loss -4 * 0.7310586; slope 4 g (1 - g) = 0.7864477, times
    # dr/dlogp = 2. A -1, tau 1.05: sigmoid(1.05) = 0.7407749; loss 4 / 1.05 * that; slope 0.7681100.
    for advantage, gate, tau, slope in ((1.0, 0.7310586, 1.0, 0.7864477), (-1.0, 0.7407749, 1.05, 0.7681100)):
        loss, gradient, metrics = loss_at(2.0, advantage, loss_type="sapo")
        assert loss == pytest.approx(-advantage * 4 * gate / tau, abs=1e-5)
        assert gradient == pytest.approx(-advantage * slope * 2.0, abs=1e-5)
        assert metrics["policy/gate_slope"] == pytest.approx(slope, abs=1e-5)


def test_gspo_by_hand():
    # Log-ratios 0.2 and 0.0 | 0.6: mean 0.1 | 0.6; s = 1.1051709 | 1.8221188, clipped to 1.3 at A = 1.
    logprob = torch.tensor([-0.8, -1.0, -0.4]).requires_grad_()
    loss = policy_loss(loss_type="gspo", clip_ratio_high=0.3, loss_agg_func="seq-mean-token-mean")
    outputs = loss(inputs(logprob, torch.full((3,), -1.0), torch.tensor([2.0, 2.0, 1.0]), [2, 1]))
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx((-2 * 1.1051709 - 1.3) / 2, abs=1e-5)
    # d(-2 s) / dlogp_t = -2 s / 2 tokens, over 2 responses.
    assert logprob.grad.tolist() == pytest.approx([-1.1051709 / 2, -1.1051709 / 2, 0.0], abs=1e-5)
    assert outputs.token_sums["policy/clip_fraction"].item() == 1.0


def test_gmpo_by_hand():
    # Log-ratios 0.2 and 0.6, limited to 0.4: mean 0.3. -0.6 with A = -1, limited to -0.4: s = exp(-0.4).
    logprob = torch.tensor([-0.8, -0.4, -1.6]).requires_grad_()
    loss = policy_loss(loss_type="gmpo", ratio_clip_eps=0.4, loss_agg_func="seq-mean-token-mean")
    outputs = loss(inputs(logprob, torch.full((3,), -1.0), torch.tensor([2.0, 2.0, -1.0]), [2, 1]))
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx((-2 * 1.3498588 + 0.6703200) / 2, abs=1e-5)
    assert logprob.grad.tolist() == pytest.approx([-1.3498588 / 2, 0.0, 0.0], abs=1e-5)
    assert outputs.token_sums["policy/clip_fraction"].item() == 2.0


def test_extreme_ratios_stay_finite():
    old, advantages = torch.tensor([-500.0, 0.0, -500.0]), torch.tensor([-1.0, -1.0, 0.0])
    for loss_type in POLICY_LOSSES:
        logprob = torch.tensor([0.0, -500.0, 0.0], requires_grad=True)
        outputs = policy_loss(loss_type=loss_type)(inputs(logprob, old, advantages, [1, 1, 1]))
        outputs.loss.backward()
        assert outputs.loss.isfinite() and logprob.grad.isfinite().all()


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_on_policy_the_gradient_is_minus_the_advantage(loss_type):
    logprob = torch.tensor([-0.3, -7.0, -1.0, -0.01], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.25])
    loss = policy_loss(loss_type=loss_type, loss_agg_func="seq-mean-token-sum")
    outputs = loss(inputs(logprob, logprob.detach(), advantages, [2, 2], Normalizers(num_tokens=4, num_sequences=1)))
    outputs.loss.backward()
    torch.testing.assert_close(logprob.grad, -advantages)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # Ratios of tokens exp(0), exp(-0.5), exp(0.5) | exp(899) = inf | exp(-0.2), exp(1)
        ("token-truncate", [1.0, 0.6065307, 1.6487213, 2.0, 0.8187308, 2.0]),
        ("token-mask", [1.0, 0.6065307, 1.6487213, 0.0, 0.8187308, 0.0]),
        # Products over a response: exp(0) | inf | exp(0.8) = 2.2255409
        ("sequence-truncate", [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]),
        ("sequence-mask", [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_importance_weights_by_hand(mode, expected):
    old = torch.full((6,), -1.0, requires_grad=True)
    engine = torch.tensor([-1.0, -0.5, -1.5, -900.0, -0.8, -2.0])
    weights = importance_weights(old, engine, Responses.of_lengths(torch.tensor([3, 1, 2])), mode=mode, clip=2.0)
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=0, atol=1e-6)
    assert not weights.requires_grad


@pytest.mark.parametrize("recompute", [True, False])
def test_the_engines_gap_is_that_of_the_policy_itself(recompute):
    """Not of the old log-probs: they may be the engine's own, and would hide any difference."""
    engine = torch.tensor([-1.0, -2.0])
    given = inputs(torch.tensor([-1.25, -1.5]), engine, torch.ones(2), [2], engine_logprob=engine)
    sums = policy_loss(recompute_logprobs=recompute)(given).token_sums
    assert sums["policy/rollout_logprob_gap"].item() == 0.75


def test_weights_scale_the_policy_loss_alone():
    options = {"importance_sampling_fix": True, "importance_sampling_mode": "token-mask", "kl_beta": 0.5}
    logprob = torch.tensor([-1.0, -1.0]).requires_grad_()
    columns = {"engine_logprob": torch.tensor([-0.5, -3.0]), "ref_logprob": torch.tensor([-1.5, -1.5])}
    given = inputs(logprob, torch.tensor([-1.0, -1.0]), torch.tensor([2.0, 2.0]), [1, 1], **columns)
    outputs = policy_loss(**options)(given)
    # Weights exp(-0.5) and, above 2, 0. KL: exp(-0.5) + 0.5 - 1 = 0.1065307 per token.
    assert outputs.shares["loss/policy"].item() == pytest.approx(-2 * 0.6065307 / 2, abs=1e-6)
    assert outputs.shares["loss/kl"].item() == pytest.approx(0.1065307, abs=1e-6)
    assert outputs.loss.item() == pytest.approx(-0.6065307 + 0.5 * 0.1065307, abs=1e-6)
    assert outputs.token_sums["policy/importance_weight"].item() == pytest.approx(0.6065307, abs=1e-6)
    assert outputs.token_sums["policy/rollout_logprob_gap"].item() == pytest.approx(2.5, abs=1e-6)
    # Gradients: policy -2 * 0.6065307 / 2, 0; KL 0.5 * (1 - exp(-0.5)) / 2 for both.
    metrics = combine({name: share.item() for name, share in outputs.shares.items()})
    kl, policy = 2**0.5 * 0.5 * 0.3934693 / 2, 0.6065307
    assert metrics["loss/kl_grad_fraction"] == pytest.approx(kl / (kl + policy), abs=1e-6)
    assert not any(name.startswith("_") for name in metrics)


def test_with_the_kl_in_the_reward_the_loss_has_none():
    given = inputs(torch.tensor([-1.0]).requires_grad_(), torch.tensor([-1.0]), torch.tensor([2.0]), [1])
    outputs = policy_loss(kl_in_reward=True, kl_beta=0.5)(given)
    assert outputs.loss.item() == -2.0 and "loss/kl" not in outputs.shares


def test_value_loss_by_hand():
    # Returns 1, 1, 1, 1; old values 0; clip 0.5. Errors of V: 0.5, 0, -1, 3. V limited to 0.5, 0.5, 0.5, -0.5:
    # errors 0.5, 0.5, 0.5, 1.5. The larger: 0.5, 0.5, 1, 3; half the mean square: 10.5 / 8. Only the second is clipped.
    value = torch.tensor([0.5, 1.0, 2.0, -2.0], requires_grad=True)
    columns = {Column.RETURN: torch.ones(4), Column.OLD_VALUE: torch.zeros(4)}
    given = critic_inputs(value, columns, [2, 2])
    outputs = ValueLoss(AlgorithmConfig(value_clip=0.5))(given)
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(10.5 / 8)
    assert value.grad.tolist() == pytest.approx([-0.5 / 4, 0.0, 1 / 4, -3 / 4])
    assert outputs.token_sums["value/clip_fraction"].item() == 1.0
    assert ValueLoss(AlgorithmConfig(value_clip=None))(given).loss.item() == pytest.approx(10.25 / 8)


def critic_inputs(value, columns, lengths, norm=None):
    responses = Responses.of_lengths(torch.tensor(lengths))
    norm = norm or Normalizers(num_tokens=sum(lengths), num_sequences=len(lengths))
    return LossInputs(value_M=value, columns=columns, seq_M=responses.seq_M, num_responses=len(lengths), norm=norm)


def test_explained_variance_by_hand():
    # Returns 0, 2, 4: variance 8/3. Errors 0, 1, -1: variance 2/3. 1 - 1/4.
    columns = {Column.RETURN: torch.tensor([0.0, 2.0, 4.0]), Column.OLD_VALUE: torch.zeros(3)}
    outputs = ValueLoss(AlgorithmConfig())(critic_inputs(torch.tensor([0.0, 1.0, 5.0]), columns, [3]))
    shares = {name: share.item() for name, share in outputs.shares.items()}
    assert combine(shares)["value/explained_variance"] == pytest.approx(0.75)
    assert set(combine(shares)) == {"loss/value", "value/explained_variance"}
    equal = columns | {Column.RETURN: torch.ones(3)}
    shares = ValueLoss(AlgorithmConfig())(critic_inputs(torch.zeros(3), equal, [3])).shares
    assert combine({name: share.item() for name, share in shares.items()})["value/explained_variance"] == 0.0


def random_columns(lengths, generator):
    size = sum(lengths)
    draw = torch.randn(6, size, generator=generator, dtype=torch.float64)
    names = (Column.OLD_LOGPROB, Column.REF_LOGPROB, Column.ENGINE_LOGPROB)
    old = {name: draw[index] * 0.3 - 2.0 for index, name in enumerate(names)}
    advantage = torch.randn(len(lengths), generator=generator, dtype=torch.float64).repeat_interleave(
        torch.tensor(lengths)
    )
    return (draw[3] * 0.3 - 2.0), draw[4].abs(), {**old, Column.ADVANTAGE: advantage, Column.RETURN: draw[5]}


ALL_TERMS = {
    "kl_beta": 0.1,
    "entropy_bonus": 0.01,
    "importance_sampling_fix": True,
    "importance_sampling_mode": "sequence-truncate",
}


@pytest.mark.parametrize("kind", REDUCTIONS)
@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_units_add_up_to_the_whole_however_responses_are_split(loss_type, kind):
    """Loss, gradient and every metric. A unit may be of one response, and a response of one token, or of none."""
    lengths = [3, 1, 5, 0, 2]
    logprob, entropy, columns = random_columns(lengths, torch.Generator().manual_seed(5))
    norm = Normalizers(num_tokens=sum(lengths), num_sequences=4)
    loss = policy_loss(loss_type=loss_type, loss_agg_func=kind, **ALL_TERMS)
    stops = [0, *accumulate(lengths)]

    def total(*sizes):
        leaf, first, results = logprob.clone().requires_grad_(), 0, []
        for size in sizes:
            part = slice(stops[first], stops[first + size])
            given = {str(name): values[part] for name, values in columns.items()}
            old, advantage = given.pop("old_logprob"), given.pop("advantage")
            unit = lengths[first : first + size]
            results.append(loss(inputs(leaf[part], old, advantage, unit, norm, entropy=entropy[part], **given)))
            results[-1].loss.backward()
            first += size
        sums = {
            name: sum({**result.shares, **result.token_sums}[name] for result in results)
            for name in {**results[0].shares, **results[0].token_sums}
        }
        return leaf.grad, sums

    whole_gradient, whole_sums = total(5)
    for sizes in ((1, 4), (2, 3), (1, 1, 1, 1, 1), (3, 2)):
        gradient, sums = total(*sizes)
        torch.testing.assert_close(gradient, whole_gradient, rtol=1e-10, atol=1e-14)
        assert sums.keys() == whole_sums.keys()
        for name, value in sums.items():
            torch.testing.assert_close(value, whole_sums[name], rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("loss_type", ("actor", "actor_critic", "sapo"))  # the others are differentiated as a whole
def test_gradients_are_those_of_finite_differences(loss_type):
    lengths = [3, 1, 4]
    logprob, entropy, columns = random_columns(lengths, torch.Generator().manual_seed(6))
    given = {str(name): values for name, values in columns.items()}
    old, advantage = given.pop("old_logprob"), given.pop("advantage")
    loss = policy_loss(loss_type=loss_type, clip_ratio_c=1.2, **ALL_TERMS)

    def function(logprob, entropy):
        return loss(inputs(logprob, old, advantage, lengths, entropy=entropy, **given)).loss

    assert torch.autograd.gradcheck(function, (logprob.requires_grad_(), entropy.requires_grad_()))


def test_the_gradient_of_the_value_loss_is_that_of_finite_differences():
    value = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).requires_grad_()
    columns = {Column.RETURN: torch.arange(6.0).double(), Column.OLD_VALUE: torch.zeros(6).double()}
    loss = ValueLoss(AlgorithmConfig())
    assert torch.autograd.gradcheck(lambda value: loss(critic_inputs(value, columns, [2, 4])).loss, value)


@pytest.mark.parametrize("kind", REDUCTIONS)
@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_a_unit_of_which_nothing_is_trained(loss_type, kind):
    empty = torch.zeros(0)
    logprob = torch.zeros(0, requires_grad=True)
    columns = {"ref_logprob": empty, "engine_logprob": empty}
    loss = policy_loss(loss_type=loss_type, loss_agg_func=kind, **ALL_TERMS)
    for norm in (Normalizers(num_tokens=0, num_sequences=0), Normalizers(num_tokens=7, num_sequences=2)):
        outputs = loss(inputs(logprob, empty, empty, [0, 0], norm, entropy=empty, **columns))
        outputs.loss.backward()
        assert outputs.loss.item() == 0.0
        assert not any(total.item() for total in [*outputs.shares.values(), *outputs.token_sums.values()])


def test_a_critic_unit_of_which_nothing_is_trained():
    value = torch.zeros(0, requires_grad=True)
    columns = {Column.RETURN: torch.zeros(0), Column.OLD_VALUE: torch.zeros(0)}
    outputs = ValueLoss(AlgorithmConfig())(
        critic_inputs(value, columns, [0], Normalizers(num_tokens=0, num_sequences=0))
    )
    outputs.loss.backward()
    assert outputs.loss.item() == 0.0
    shares = {name: share.item() for name, share in outputs.shares.items()}
    assert combine(shares) == {"loss/value": 0.0, "value/explained_variance": 0.0}


def test_without_the_entropy_bonus_no_entropy_is_asked_for():
    assert [policy_loss(**options).wants_entropy for options in ({}, {"entropy_bonus": 0.1})] == [False, True]
    assert policy_loss(calculate_entropy=True).wants_entropy
