"""``actor.training_backend: megatron`` and ``strategy: fsdp``: what is refused with them, and what without."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from rlinf_lite.config import ConfigError, build, check

START = {"runner": {"experiment_name": "x"}, "actor": {"model": {"model_path": "m"}}, "data": {"type": "arithmetic"}}
MEGATRON = {"actor.training_backend": "megatron"}
ENGINE = {"actor.megatron.transformer_impl": "transformer_engine"}


def config_with(values):
    raw = OmegaConf.create(START)
    for key, value in values.items():
        OmegaConf.update(raw, key, value)
    config = build(raw)
    check(config)
    return config


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"actor.megatron.loss_scale": 128.0}, "loss_scale=128.0: is for actor.model.precision=fp16; set it to null"),
        ({"actor.optim.loss_scale": 65536}, "loss_scale=65536.0: is for actor.model.precision=fp16; set it to null"),
        ({"actor.model.dropout": True}, "actor.model.dropout=true"),
        ({"critic.use_critic_model": True, "algorithm.adv_type": "gae"}, "trains no critic"),
        ({"actor.megatron.pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size=2"),
        ({"actor.model.tensor_model_parallel_size": 2, "actor.megatron.tensor_model_parallel_size": 4}, "write one"),
        ({"actor.fsdp_config.gradient_checkpointing": True}, "actor.megatron.recompute_granularity=full does the same"),
        ({"actor.fsdp_config.cpu_offload": True}, "actor.fsdp_config.cpu_offload=true: is for"),
        ({"actor.megatron.ckpt_format": "torch_dist"}, "ckpt_format=torch_dist"),
        ({**ENGINE, "cluster.device": "cpu"}, "on GPUs only, and cluster.device=cpu; set it to local"),
        ({**ENGINE, "actor.megatron.sequence_parallel": True}, "set one of them to false or local"),
    ],
)
def test_refused_with_megatron(values, said):
    with pytest.raises(ConfigError, match=said):
        config_with(MEGATRON | values)


@pytest.mark.parametrize(
    "values",
    [
        {"actor.megatron.tensor_model_parallel_size": 2},
        {"actor.model.tensor_model_parallel_size": 2},
        {"actor.megatron.recompute_granularity": "full"},
        {"actor.megatron.sequence_parallel": True},
        {"actor.model.sequence_parallel": True},
        {"actor.megatron.make_vocab_size_divisible_by": 64},
        ENGINE,
    ],
)
def test_keys_of_megatron_are_refused_with_fsdp(values):
    with pytest.raises(ConfigError, match="is for Megatron only"):
        config_with(values)
    config_with(MEGATRON | values)


@pytest.mark.parametrize("section", ["actor", "critic"])
@pytest.mark.parametrize(
    ("key", "value", "others"),
    [
        ("cpu_offload", True, {}),
        ("reshard_after_forward", False, {}),
        ("grad_scaler.enabled", True, {"mixed_precision.param_dtype": "fp16"}),
    ],
)
def test_refused_with_fsdp1(section, key, value, others):
    prefix = f"{section}.fsdp_config"
    given = {"critic.use_critic_model": True, "algorithm.adv_type": "gae", "algorithm.loss_type": "actor_critic"}
    given |= {f"{prefix}.{name}": choice for name, choice in {key: value, **others}.items()}
    config_with(given)
    with pytest.raises(ConfigError, match=rf"{prefix}\.{key}=\w+: is for {prefix}\.strategy=fsdp2"):
        config_with({**given, f"{prefix}.strategy": "fsdp"})
    del given[f"{prefix}.{key}"]
    config_with({**given, f"{prefix}.strategy": "fsdp"})


def test_rlinfs_place_of_the_keys_is_followed():
    given = {
        "actor.model.tensor_model_parallel_size": 2,
        "actor.model.sequence_parallel": True,
        "actor.model.recompute_granularity": "full",
    }
    megatron = config_with(MEGATRON | given).actor.megatron
    assert megatron.sequence_parallel
    assert megatron.tensor_model_parallel_size == 2
    assert megatron.recompute_granularity == "full"
    assert megatron.pipeline_model_parallel_size == 1
