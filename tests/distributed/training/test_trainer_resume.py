"""Saved, loaded in new processes and continued: bitwise identical, including the RNG state of each rank."""

from __future__ import annotations

import pytest
import torch

DROPOUT = {
    "actor.model.dropout": True,
    "algorithm.n_minibatches": 2,
    "algorithm.kl_beta": 0.1,
    "algorithm.shuffle_rollout": True,
    "actor.optim.lr_scheduler": "cosine",
    "actor.optim.lr_warmup_steps": 2,
    "actor.optim.clip_grad": 0.5,
}
FP16 = {
    "actor.fsdp_config.mixed_precision.param_dtype": "fp16",
    "actor.fsdp_config.mixed_precision.reduce_dtype": "fp32",
    "actor.fsdp_config.grad_scaler.enabled": True,
    "actor.fsdp_config.grad_scaler.init_scale": 2.0**19,  # overflows at first
    "actor.fsdp_config.grad_scaler.growth_interval": 2,
}


@pytest.mark.parametrize("changes", [DROPOUT, {**DROPOUT, **FP16}], ids=["fp32", "fp16-scaled"])
def test_resumed_equals_straight(
    ranks, fresh_ranks, model_dirs, make_config, groups, advantages, assert_same_state, tmp_path, changes
):
    given = {
        "model_dir": model_dirs["gpt2"],
        "config": make_config(changes),
        "groups": groups,
        "advantages": advantages,
        "root": str(tmp_path),
    }
    straight = ranks.run(2, "train_and_save", **given, steps=range(1, 5), save_after=2)
    resumed = fresh_ranks.run(2, "train_and_save", **given, steps=range(3, 5), load=straight[0]["path"])
    for one, other in zip(straight, resumed, strict=True):
        assert_same_state(one, other)
        assert repr(one["reports"][4:]) == repr(other["reports"])  # the norm of an overflow is NaN
        assert torch.equal(one["random"], other["random"])
    assert not torch.equal(straight[0]["random"], straight[1]["random"])
    assert straight[0]["num_updates"] == 8
    skipped = [report.skipped for report in straight[0]["reports"]]
    assert set(skipped[4:]) == ({False} if changes is DROPOUT else {False, True}), skipped


@pytest.mark.parametrize("dropout", [True, False])
def test_dropout_depends_on_the_rng_state_of_the_rank(
    ranks, model_dirs, make_config, groups, advantages, tmp_path, dropout
):
    """The test above would detect lost RNG state: another one gives another update. Without dropout an update draws no
    random numbers, and the policy that is updated is the one that was sampled."""
    given = {
        "model_dir": model_dirs["gpt2"],
        "config": make_config({"actor.model.dropout": dropout}),
        "groups": groups,
        "advantages": advantages,
        "root": str(tmp_path),
    }
    first = ranks.run(2, "train_and_save", **given, steps=range(1, 3))[0]
    second = ranks.run(2, "train_and_save", **given, steps=range(1, 3), save_after=1)[0]
    shuffled = ranks.run(2, "train_and_save", **given, steps=range(1, 3), draw=1)[0]
    name = "transformer.wte.weight"
    assert torch.equal(first["model"][name], second["model"][name]), "a save draws nothing"
    assert torch.equal(first["model"][name], shuffled["model"][name]) is not dropout


def test_another_number_of_ranks(ranks, model_dirs, make_config, groups, advantages, assert_same_state, tmp_path):
    """Weights, optimizer state and counters are the same on 1 and 3 ranks; later sums are in another order."""
    given = {
        "model_dir": model_dirs["llama"],
        "config": make_config(),
        "groups": groups,
        "advantages": advantages,
        "root": str(tmp_path),
    }
    saved = ranks.run(2, "train_and_save", **given, steps=range(1, 3), save_after=2)[0]
    for world_size in (1, 3):
        loaded = ranks.run(world_size, "train_and_save", **given, steps=range(3, 3), load=saved["path"])
        for result in loaded:
            assert_same_state(result, saved)
