"""Saved, loaded in new processes and continued: bitwise identical, including the RNG state of each rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlinf_lite.checkpoint.formats.read_state import read_tensors

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


FSDP1 = {"actor.fsdp_config.strategy": "fsdp"}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(DROPOUT, id="fp32"),
        pytest.param({**DROPOUT, **FP16}, id="fp16-scaled", marks=pytest.mark.soak),
        pytest.param({**DROPOUT, **FSDP1}, id="FSDP1"),
    ],
)
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
    assert set(skipped[4:]) == ({False, True} if FP16.keys() <= changes.keys() else {False}), skipped
    check_full_weights(Path(straight[0]["path"]) / "actor")


def check_full_weights(section: Path) -> None:
    """The file beside the shards holds the same model, with all names of tied weights, and any torch reads it."""
    full = torch.load(section / "model_state_dict/full_weights.pt", weights_only=True)
    assert full["lm_head.weight"].data_ptr() == full["transformer.wte.weight"].data_ptr()
    for name, tensor in read_tensors(section, lambda name: name.startswith("model.")).items():
        assert torch.equal(full.pop(name.removeprefix("model.")), tensor), name
    assert list(full) == ["lm_head.weight"]


@pytest.mark.parametrize("dropout", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_dropout_depends_on_the_seed_and_not_on_the_rng_state(
    ranks, model_dirs, make_config, groups, advantages, tmp_path, dropout
):
    """Whatever was drawn before, each unit's dropout is the same. Without dropout an update draws no random numbers,
    and the policy that is updated is the one that was sampled."""

    def trained(*, seed=1, **others):
        config = make_config({"actor.model.dropout": dropout, "actor.seed": seed})
        given = {"model_dir": model_dirs["gpt2"], "config": config, "groups": groups, "advantages": advantages}
        result = ranks.run(2, "train_and_save", **given, root=str(tmp_path), steps=range(1, 3), **others)[0]
        return result["model"]["transformer.wte.weight"]

    first = trained()
    assert torch.equal(first, trained(draw=1))
    assert torch.equal(first, trained(seed=2)) is not dropout
