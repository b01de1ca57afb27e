"""The update's half of the self-check, on sharded models: what it finds, and that training does not notice it."""

from __future__ import annotations

import pytest
import torch

from rlinf_lite.config import Config

MIXED = "actor.fsdp_config.mixed_precision."
OPTIONS = {
    "llama": {},
    "gpt2": {
        "actor.model.dropout": True,
        "actor.fsdp_config.gradient_checkpointing": True,
        "algorithm.kl_beta": 0.1,
        "algorithm.entropy_bonus": 0.01,
    },
    "untied": {
        f"{MIXED}param_dtype": "fp16",
        f"{MIXED}reduce_dtype": "fp32",
        "actor.fsdp_config.grad_scaler.enabled": True,
        "actor.fsdp_config.reshard_after_forward": False,
    },
}


@pytest.fixture
def given(model_dirs, groups, advantages, make_config):
    def make(model: str) -> dict:
        config: Config = make_config(OPTIONS[model])
        return {"model_dir": model_dirs[model], "config": config, "groups": groups, "advantages": advantages}

    return make


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.soak), 2])
@pytest.mark.parametrize(
    "model", [name if name == "llama" else pytest.param(name, marks=pytest.mark.soak) for name in OPTIONS]
)
def test_a_check_finds_nothing_and_changes_nothing(ranks, given, assert_same_state, model, world_size):
    """Even between two steps, with dropout, which takes random numbers."""
    plain = ranks.run(world_size, "train_and_check", **given(model), checks=False)
    checked = ranks.run(world_size, "train_and_check", **given(model), checks=True)
    for without, with_check in zip(plain, checked, strict=True):
        assert_same_state(without, with_check)
        assert without["reports"] == with_check["reports"]
        assert torch.equal(without["random"], with_check["random"])
        assert [check.difference for check in with_check["checks"]] == [None, None]
        assert all(
            torch.equal(*map(torch.from_numpy, (c.values_M, checked[0]["checks"][n].values_M)))
            for n, c in enumerate(with_check["checks"])
        )


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.soak), 2])
@pytest.mark.parametrize("model", ["llama", pytest.param("gpt2", marks=pytest.mark.soak)])
def test_noise_in_one_ranks_backward_pass_is_named(ranks, given, model, world_size):
    """Dropout is not: its numbers are drawn again."""
    found = ranks.run(world_size, "check_with_noise", **given(model), noisy_rank=world_size - 1)
    assert any("the gradient of " in (check.difference or "") for check, _ in found)
    assert [name for _, name in found if name is not None] == ["rlinf_lite_test.noisy.default"]
