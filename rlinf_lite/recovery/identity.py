"""The identity of a run: everything that determines its numbers. A resume that changes it is refused by name.

It takes the whole config, because a key that is not `Neutral` belongs to it wherever it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlinf_lite.config import Config, ConfigError, OptimConfig, flatten, keys
from rlinf_lite.config.versions import FIRST_NUMERICS, FIRST_SAMPLER, versions
from rlinf_lite.models.hf_directory import TOKENIZER_FILES
from rlinf_lite.recovery.converted import ANOTHER_PROGRAM

_VAL_DATA = "data (validation problems)"
_USES_CRITIC = "critic.use_critic_model"
_RUNNING_ROWS = "rollout.max_running_requests"
_INITIAL_WEIGHTS = "actor.model (initial weights)"
ONE_SIDED = (_VAL_DATA, _INITIAL_WEIGHTS)  # not compared where one side has none

ADDED = (
    "algorithm.kl_in_reward",
    "algorithm.sapo_temperature_pos",
    "algorithm.sapo_temperature_neg",
    "algorithm.gamma",
    "algorithm.gae_lambda",
    "algorithm.value_clip",
    "algorithm.critic_warmup_steps",
    "algorithm.importance_sampling_mode",
    "algorithm.overlong_buffer",
    "algorithm.overlong_penalty",
    "algorithm.mask_truncated",
    "algorithm.dynamic_sampling",
    "algorithm.max_sampling_rounds",
    "reward.functions",
    "algorithm.sampling_params.min_p",
    "algorithm.val_sampling_params.min_p",
    "actor.fsdp_config.virtual_ranks",
    "critic.fsdp_config.virtual_ranks",
    "actor.megatron.loss_scale",
    "actor.megatron.loss_scale_window",
    "actor.megatron.transformer_impl",
)
"""Keys that older checkpoints lack, and whose default is what every run did before there was the key."""


def identity(
    config: Config,
    *,
    base_model: str,
    critic_model: str | None,
    tokenizer: str,
    engine: str,
    train_data: str,
    val_data: str | None,
    reward: str | None = None,
    algorithm: str | None = None,
    initial_weights: str | None,
    total_updates: int,
) -> dict[str, Any]:
    """Everything that makes the numbers, flat, as JSON values.

    Args:
        base_model, tokenizer, engine, train_data, val_data: fingerprints.
        critic_model: fingerprint of the critic's base model; None without a critic.
        reward: fingerprint of a user's function, or of the package that grades.
        algorithm: fingerprint of a user's algorithm.
        initial_weights: fingerprint of the checkpoint whose weights the run began with; None: the base model's, or it
            is not known any more.
        total_updates: over how many optimizer steps a rate decays that has no number of its own.
    """
    made = _without_free_keys(flatten(config, neutral_keys=False))
    if critic_model is None:  # keys of a critic that is not there make no number
        made = {key: value for key, value in made.items() if not key.startswith("critic.") or key == _USES_CRITIC}
    else:
        made["critic.model (base weights)"] = critic_model
        made["critic.optim.total_training_steps"] = _decay_steps(config.critic.optim, total_updates)
    return made | {
        "actor.optim.total_training_steps": _decay_steps(config.actor.optim, total_updates),
        "actor.model (base weights)": base_model,
        _INITIAL_WEIGHTS: initial_weights,
        TOKENIZER_FILES: tokenizer,
        "rollout.model (config and eos)": engine,
        "data (training problems)": train_data,
        _VAL_DATA: val_data,
        "reward (source)": reward,
        "algorithm (source)": algorithm,
        **versions(config.rollout, config.actor.training_backend),
    }


def _without_free_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what changes no number: how many rows the builtin engine generates at once."""
    free = _RUNNING_ROWS if values.get("rollout.rollout_backend") == "builtin" else None
    return {key: value for key, value in values.items() if key != free}


def _decay_steps(optim: OptimConfig, total_updates: int) -> int | None:
    """Over how many optimizer steps the rate decays; None if it does not."""
    return None if optim.lr_scheduler == "constant" else optim.total_training_steps or total_updates


def refuse_changes(saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str], source: str) -> list[str]:
    """Compare the identity in a checkpoint with the one configured now.

    Returns:
        The changes that were allowed by name, for the log.

    Raises:
        ConfigError: what else changed, key by key, with the remedy.
    """
    before = {key: keys()[key].default for key in ADDED if key in now} | {"algorithm (source)": None}
    if "versions.numerics" in now:
        before["versions.numerics"] = FIRST_NUMERICS
    if "versions.sampler" in now and saved.get("rollout.rollout_backend") == "builtin":
        before["versions.sampler"] = FIRST_SAMPLER
    saved, now = before | _without_free_keys(saved), _without_free_keys(now)
    changes = {
        key: f"{key}: {saved.get(key, '(absent)')} -> {now.get(key, '(absent)')}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and not (key in ONE_SIDED and None in (saved.get(key), now.get(key)))
    }
    compared = {*saved, *now, ANOTHER_PROGRAM}
    if unused := [key for key in allowed if key not in compared]:
        raise ConfigError(f"runner.resume_allow_changes: {unused[0]!r} is not a key that a resume compares")
    refused = [line for key, line in changes.items() if key not in allowed]
    if refused:
        if any("total_training_steps" in line for line in refused):
            refused.append("(the steps over which the rate decays follow from runner.max_steps and max_epochs)")
        names = ",".join(f"'{key}'" for key in changes if key not in allowed)
        listed = "\n  ".join(refused)
        raise ConfigError(
            f"resuming from {source} would not give the same numbers, because this changed:\n  {listed}\n"
            f'change it back, or allow it by name: "runner.resume_allow_changes=[{names}]"'
        )
    return [line for key, line in changes.items() if key in allowed]


def carried_on(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The identity that later checkpoints get: what the run began with stays known when it is not configured again."""
    return {**now, _INITIAL_WEIGHTS: now[_INITIAL_WEIGHTS] or saved.get(_INITIAL_WEIGHTS)}
