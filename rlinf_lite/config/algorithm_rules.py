"""Keys of the algorithm that do not fit together, or with other sections, each with what to write instead."""

from __future__ import annotations

from collections.abc import Iterator

from rlinf_lite.config.algorithm import AlgorithmConfig
from rlinf_lite.config.identity import value_of
from rlinf_lite.config.schema import Config, keys
from rlinf_lite.config.written import shown

_COMPARES_GROUPS = ("grpo", "dr_grpo", "rloo", "reinpp_baseline", "maxrl")
_HAS_RETURNS = ("reinpp", "reinpp_baseline", "gae")
_HAS_CLIP = ("actor", "actor_critic", "gspo")


def algorithm_problems(config: Config) -> list[str]:
    """What does not fit together, one line each."""
    algorithm = config.algorithm
    return [
        *_logprobs(config),
        *_groups(algorithm),
        *_critic(config),
        *_kl(algorithm),
        *_shaping(algorithm),
        *_penalties(config),
        *_unused(algorithm),
    ]


def _logprobs(config: Config) -> Iterator[str]:
    algorithm, logprobs = config.algorithm, config.rollout.return_logprobs
    if not algorithm.recompute_logprobs and not logprobs:
        yield (
            "algorithm.recompute_logprobs=false: without it the engine must report old log-probs; set it to true, or "
            "rollout.return_logprobs=true"
        )
    if algorithm.importance_sampling_fix and not (logprobs and algorithm.recompute_logprobs):
        yield (
            "algorithm.importance_sampling_fix=true: compares the engine's log-probs with recomputed ones; set "
            "rollout.return_logprobs=true and algorithm.recompute_logprobs=true"
        )


def _groups(algorithm: AlgorithmConfig) -> Iterator[str]:
    if algorithm.group_size > 1:
        return
    if algorithm.adv_type in _COMPARES_GROUPS and algorithm.path is None:
        yield (
            f"algorithm.group_size=1: {algorithm.adv_type} compares the responses of a group; use at least 2, or "
            "algorithm.adv_type=reinpp"
        )
    if algorithm.dynamic_sampling:
        yield (
            "algorithm.dynamic_sampling=true: drops groups whose rewards are all equal, and with "
            "algorithm.group_size=1 they always are; use at least 2, or set it to false"
        )


def _critic(config: Config) -> Iterator[str]:
    algorithm, has_critic = config.algorithm, config.critic.use_critic_model
    if algorithm.path is not None:
        return  # what a user's algorithm needs is checked when it is built
    if algorithm.adv_type == "gae" and not has_critic:
        yield "algorithm.adv_type=gae: needs the values of a critic; set critic.use_critic_model=true"
    if algorithm.adv_type != "gae" and has_critic:
        yield (
            f"critic.use_critic_model=true: algorithm.adv_type={algorithm.adv_type} uses no values; set it to false, "
            "or algorithm.adv_type=gae"
        )
    if algorithm.loss_type == "actor_critic" and algorithm.adv_type != "gae":
        yield (
            f"algorithm.loss_type=actor_critic: algorithm.adv_type={algorithm.adv_type} has no critic; set "
            "algorithm.loss_type=actor, or algorithm.adv_type=gae"
        )


def _kl(algorithm: AlgorithmConfig) -> Iterator[str]:
    kind, corrected = algorithm.kl_penalty_type, algorithm.kl_importance_correction
    if algorithm.kl_in_reward:
        yield from _kl_in_reward(algorithm)
    elif algorithm.kl_beta > 0 and kind == "kl" and not corrected:
        yield (
            f"algorithm.kl_penalty_type=kl with algorithm.kl_beta={algorithm.kl_beta}: in a loss its expected gradient "
            "is zero, so it would only add noise; use mse, whose gradient is that of KL(policy || reference), "
            "low_var_kl, or set algorithm.kl_importance_correction=true or algorithm.kl_in_reward=true"
        )
    elif algorithm.kl_beta > 0 and kind == "abs" and corrected:
        yield (
            "algorithm.kl_importance_correction=true: corrects estimates of the KL, and algorithm.kl_penalty_type=abs "
            "is none; use low_var_kl, mse or kl"
        )


def _kl_in_reward(algorithm: AlgorithmConfig) -> Iterator[str]:
    if not algorithm.kl_beta:
        yield (
            "algorithm.kl_in_reward=true: algorithm.kl_beta=0 gives it no weight; raise kl_beta, or set kl_in_reward "
            "to false"
        )
    if algorithm.kl_importance_correction:
        yield (
            "algorithm.kl_importance_correction=true: corrects a KL in the loss, and with algorithm.kl_in_reward=true "
            "there is none; set one of them to false"
        )
    if algorithm.kl_penalty_type in ("mse", "abs"):
        yield (
            f"algorithm.kl_penalty_type={algorithm.kl_penalty_type}: its mean is not the KL, which counts with "
            "algorithm.kl_in_reward=true; use kl or low_var_kl"
        )
    if algorithm.adv_type == "maxrl":
        yield (
            "algorithm.kl_in_reward=true: algorithm.adv_type=maxrl divides by a mean reward, which the KL could make "
            "negative; set it to false, or use dr_grpo"
        )


def _shaping(algorithm: AlgorithmConfig) -> Iterator[str]:
    longest = algorithm.sampling_params.max_new_tokens
    if algorithm.overlong_buffer > longest:
        yield (
            f"algorithm.overlong_buffer={algorithm.overlong_buffer}: is longer than a response, "
            f"algorithm.sampling_params.max_new_tokens={longest}; use less"
        )
    if algorithm.overlong_buffer and algorithm.adv_type == "maxrl":
        yield (
            f"algorithm.overlong_buffer={algorithm.overlong_buffer}: algorithm.adv_type=maxrl divides by a mean "
            "reward, which a penalty could make negative; set it to 0, or use dr_grpo"
        )


def _penalties(config: Config) -> Iterator[str]:
    for key, function in config.reward.by_key().items():
        if function.weight < 0 and config.algorithm.adv_type == "maxrl" and config.algorithm.path is None:
            yield (
                f"{key}.weight={function.weight}: algorithm.adv_type=maxrl divides by a mean reward, which a penalty "
                "could make negative; use a positive weight, or dr_grpo"
            )


def _unused(algorithm: AlgorithmConfig) -> Iterator[str]:
    """Keys that are set and have no effect."""
    if algorithm.path is not None:
        return  # a user's algorithm may read any of them
    for names, is_used, remedy in (
        (("gamma",), algorithm.adv_type in _HAS_RETURNS, f"algorithm.adv_type={' or '.join(_HAS_RETURNS)}"),
        (("gae_lambda", "value_clip", "critic_warmup_steps"), algorithm.adv_type == "gae", "algorithm.adv_type=gae"),
        (
            ("sapo_temperature_pos", "sapo_temperature_neg"),
            algorithm.loss_type == "sapo",
            "algorithm.loss_type=sapo",
        ),
        (("clip_ratio_c",), algorithm.loss_type in _HAS_CLIP, f"algorithm.loss_type={' or '.join(_HAS_CLIP)}"),
        (
            ("importance_sampling_mode",),
            algorithm.importance_sampling_fix,
            "algorithm.importance_sampling_fix=true",
        ),
        (("overlong_penalty",), algorithm.overlong_buffer > 0, "algorithm.overlong_buffer"),
        (("max_sampling_rounds",), algorithm.dynamic_sampling, "algorithm.dynamic_sampling=true"),
    ):
        for name in names:
            key, value = f"algorithm.{name}", value_of(algorithm, name)
            default = keys()[key].default
            if not is_used and value != default:
                yield f"{key}={shown(value)}: has no effect here; set it to {shown(default)}, or set {remedy}"
