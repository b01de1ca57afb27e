"""Choices of the algorithm that contradict each other are refused with key, value and remedy."""

from __future__ import annotations

import pytest

from rlinf_lite.config import build
from rlinf_lite.config.algorithm_rules import algorithm_problems
from rlinf_lite.config.unusual import unusual_values

START = {"runner": {"experiment_name": "x"}, "actor": {"model": {"model_path": "m"}}, "data": {"type": "arithmetic"}}
PPO = {"adv_type": "gae", "loss_type": "actor_critic"}


def found(critic: bool = False, **algorithm: object) -> list[str]:
    config = build({**START, "algorithm": algorithm})
    config.critic.use_critic_model = critic
    return algorithm_problems(config)


@pytest.mark.parametrize(
    ("critic", "algorithm", "said"),
    [
        (False, PPO, "algorithm.adv_type=gae: needs the values of a critic; set critic.use_critic_model=true"),
        (True, {"adv_type": "rloo"}, "critic.use_critic_model=true: algorithm.adv_type=rloo uses no values; set it to"),
        (
            False,
            {"loss_type": "actor_critic"},
            "algorithm.loss_type=actor_critic: algorithm.adv_type=grpo has no",
        ),
        *(
            (False, {"group_size": 1, "adv_type": name}, f"algorithm.group_size=1: {name} compares the responses")
            for name in ("grpo", "dr_grpo", "rloo", "reinpp_baseline", "maxrl")
        ),
        (
            False,
            {"adv_type": "reinpp", "group_size": 1, "dynamic_sampling": True},
            "algorithm.dynamic_sampling=true: drops groups whose rewards are all equal, and with algorithm.group",
        ),
        (False, {"kl_in_reward": True}, "algorithm.kl_in_reward=true: algorithm.kl_beta=0 gives it no weight"),
        (
            False,
            {"kl_in_reward": True, "kl_beta": 0.1, "kl_penalty_type": "mse"},
            "algorithm.kl_penalty_type=mse: its mean is not the KL",
        ),
        (
            False,
            {"kl_in_reward": True, "kl_beta": 0.1, "kl_importance_correction": True},
            "algorithm.kl_importance_correction=true: corrects a KL in the loss",
        ),
        (
            False,
            {"kl_in_reward": True, "kl_beta": 0.1, "adv_type": "maxrl"},
            "algorithm.kl_in_reward=true: algorithm.adv_type=maxrl divides by a mean reward",
        ),
        (False, {"overlong_buffer": 4, "adv_type": "maxrl"}, "algorithm.overlong_buffer=4: algorithm.adv_type=maxrl"),
        (False, {"overlong_buffer": 9999}, "algorithm.overlong_buffer=9999: is longer than a response"),
        (
            False,
            {"gamma": 0.9},
            "algorithm.gamma=0.9: has no effect here; set it to 1.0, or set algorithm.adv_type=",
        ),
        (False, {"gae_lambda": 0.9}, "algorithm.gae_lambda=0.9: has no effect here"),
        (False, {"value_clip": None}, "algorithm.value_clip=null: has no effect here; set it to 0.2"),
        (False, {"critic_warmup_steps": 1}, "algorithm.critic_warmup_steps=1: has no effect here"),
        (False, {"sapo_temperature_pos": 2.0}, "algorithm.sapo_temperature_pos=2.0: has no effect here"),
        (
            False,
            {"loss_type": "sapo", "clip_ratio_c": 3.0},
            "algorithm.clip_ratio_c=3.0: has no effect here",
        ),
        (
            False,
            {"importance_sampling_mode": "token-mask"},
            "has no effect here; set it to token-truncate, or set algorithm.importance_sampling_fix=true",
        ),
        (False, {"overlong_penalty": 2.0}, "algorithm.overlong_penalty=2.0: has no effect here"),
        (False, {"max_sampling_rounds": 3}, "algorithm.max_sampling_rounds=3: has no effect here"),
    ],
)
def test_a_contradiction_is_named_with_its_remedy(critic, algorithm, said):
    problems = found(critic, **algorithm)
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("critic", "algorithm"),
    [
        (False, {}),
        (True, {**PPO, "group_size": 1, "gamma": 0.99, "gae_lambda": 0.95, "critic_warmup_steps": 3}),
        (True, {"adv_type": "gae", "loss_type": "gspo", "value_clip": None}),
        (False, {"adv_type": "reinpp", "group_size": 1, "gamma": 0.9}),
        (False, {"adv_type": "reinpp", "kl_in_reward": True, "kl_beta": 0.1, "kl_penalty_type": "kl"}),
        (False, {"loss_type": "sapo", "sapo_temperature_neg": 2.0}),
        (False, {"loss_type": "cispo", "clip_ratio_high": 4.0}),
        (False, {"overlong_buffer": 16, "overlong_penalty": 0.5, "mask_truncated": True}),
        (False, {"dynamic_sampling": True, "max_sampling_rounds": 3, "clip_ratio_high": 0.28}),
        (True, {"path": "a:b", "group_size": 1, "gamma": 0.5, "sapo_temperature_pos": 3.0}),
    ],
)
def test_what_fits_together_is_accepted(critic, algorithm):
    assert found(critic, **algorithm) == []


@pytest.mark.parametrize(
    ("algorithm", "notes"),
    [
        ({"loss_type": "gspo"}, ["algorithm.loss_type=gspo: "]),
        ({"loss_type": "gspo", "clip_ratio_low": 0.0003, "clip_ratio_high": 0.0004}, []),
        ({"loss_type": "cispo", "clip_ratio_high": 4.0}, []),
        ({"loss_type": "actor", "clip_ratio_high": 4.0}, ["algorithm.clip_ratio_high=4.0: "]),
    ],
)
def test_an_unusual_clip_is_noted(algorithm, notes):
    found = list(unusual_values(build({**START, "algorithm": algorithm})))
    assert len(found) == len(notes) and all(map(str.startswith, found, notes)), found


def test_importance_sampling_compares_two_log_probs():
    assert "algorithm.importance_sampling_fix=true: compares" in found(importance_sampling_fix=True)[0]
