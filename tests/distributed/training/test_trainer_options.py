"""Gradient checkpointing, mixed precision, loss scaling, CPU offload, and what a broken gradient leaves behind."""

from __future__ import annotations

import pytest
import torch

MIXED = "actor.fsdp_config.mixed_precision."
SCALER = "actor.fsdp_config.grad_scaler."
FP16 = {
    f"{MIXED}param_dtype": "fp16",
    f"{MIXED}reduce_dtype": "fp32",
    f"{SCALER}enabled": True,
    f"{SCALER}init_scale": 1024.0,
    f"{SCALER}growth_interval": 2,
}


@pytest.fixture
def given(model_dirs, groups, advantages, make_config):
    def make(changes=None, model="llama", **others):
        return {
            "model_dir": model_dirs[model],
            "config": make_config(changes),
            "groups": groups,
            "advantages": advantages,
            **others,
        }

    return make


@pytest.mark.parametrize(
    ("reshard", "model"),
    [
        pytest.param(True, "llama", marks=pytest.mark.soak),
        (False, "gpt2"),
        pytest.param(False, "llama", marks=pytest.mark.soak),
        pytest.param(True, "gpt2", marks=pytest.mark.soak),
    ],
)
def test_gradient_checkpointing_changes_no_bit(ranks, given, assert_same_state, model, reshard):
    """GPT-2's dropout is drawn again, not anew, when activations are recomputed."""
    plain = {"actor.fsdp_config.reshard_after_forward": reshard, "actor.model.dropout": True}
    first = ranks.run(2, "train", **given(plain, model, num_steps=2))
    second = ranks.run(
        2, "train", **given({**plain, "actor.fsdp_config.gradient_checkpointing": True}, model, num_steps=2)
    )
    assert_same_state(first[0], second[0])
    assert first[0]["num_updates"] == 2


def test_resharding_changes_no_bit(ranks, given, assert_same_state):
    kept = {"actor.fsdp_config.reshard_after_forward": False}
    assert_same_state(ranks.run(2, "train", **given())[0], ranks.run(2, "train", **given(kept))[0])


def test_cpu_offload_changes_no_bit(ranks, given, assert_same_state):
    offloaded = {"actor.fsdp_config.cpu_offload": True, "actor.optim.clip_grad": 0.05, "algorithm.kl_beta": 0.1}
    plain = {**offloaded, "actor.fsdp_config.cpu_offload": False}
    assert_same_state(
        ranks.run(2, "train", **given(plain, num_steps=2))[0], ranks.run(2, "train", **given(offloaded, num_steps=2))[0]
    )


def test_bf16_compute_keeps_float32_state(ranks, given):
    exact = ranks.run(2, "train", **given())[0]
    mixed = {f"{MIXED}param_dtype": "bf16", f"{MIXED}reduce_dtype": "fp32"}
    for reduce_dtype in ("fp32", None):
        result = ranks.run(2, "train", **given({**mixed, f"{MIXED}reduce_dtype": reduce_dtype}))[0]
        assert result["dtypes"] == {torch.float32}
        for name, moments in result["optim"].items():
            assert {value.dtype for value in moments.values()} == {torch.float32}
            gradient, expected = moments["exp_avg"], exact["optim"][name]["exp_avg"]
            assert not torch.equal(gradient, expected)
            # bf16 has 8 bits: the direction is right, the digits are not.
            assert torch.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.99, name


def test_bf16_parameters_have_bf16_moments(ranks, given):
    result = ranks.run(2, "train", **given({"actor.model.precision": "bf16"}))[0]
    assert result["dtypes"] == {torch.bfloat16}
    assert {m["exp_avg"].dtype for m in result["optim"].values()} == {torch.bfloat16}


def test_loss_scaling_leaves_the_update_alone(ranks, given):
    scaled = ranks.run(2, "train", **given(FP16))[0]
    unscaled = ranks.run(2, "train", **given({**FP16, f"{SCALER}enabled": False}))[0]
    assert scaled["reports"][0].grad_norm == pytest.approx(unscaled["reports"][0].grad_norm, rel=0.01)
    assert not scaled["reports"][0].skipped
    assert scaled["dtypes"] == {torch.float32}


def test_an_overflow_is_skipped_on_every_rank(ranks, given, advantages, assert_same_state):
    """Two good steps double the scale, an overflow halves it; the schedule counts the skipped step, Adam does not."""
    too_large = advantages * 1e6
    changes = {**FP16, "actor.optim.lr_scheduler": "linear"}
    arguments = given(changes, advantages_of_steps=[advantages, advantages, too_large, advantages], total_updates=4)
    del arguments["advantages"]
    start, first, second, skipped, last = ranks.run(2, "train_with_failures", **arguments)[1]
    assert [s["report"].skipped for s in (first, second, skipped, last)] == [False, False, True, False]
    assert [s["grad_scaler"]["scale"].item() for s in (start, first, second, skipped, last)] == [
        1024,
        1024,
        2048,
        1024,
        1024,
    ]
    assert [s["report"].lr for s in (first, second, skipped, last)] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert_same_state({**second, "num_updates": 3, "grad_scaler": None}, {**skipped, "grad_scaler": None})
    assert {moments["step"].item() for moments in last["optim"].values()} == {3.0}


def test_a_gradient_that_is_not_finite_changes_nothing(ranks, given, advantages, assert_same_state):
    broken = advantages.clone()
    broken[4] = torch.nan
    arguments = given(advantages_of_steps=[advantages, broken, advantages])
    del arguments["advantages"]
    for result in ranks.run(3, "train_with_failures", **arguments):
        _, first, failed, last = result
        assert "the gradient norm is nan after 1 optimizer steps; nothing was updated" in failed["error"]
        assert_same_state(first, failed)
        assert last["num_updates"] == 2
    arguments["advantages_of_steps"] = [advantages, advantages]
    assert_same_state(ranks.run(3, "train_with_failures", **arguments)[0][-1], last)


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_a_step_that_leaves_a_nan_behind_is_an_error(ranks, given, moment):
    """Found after the step, by the rank whose shard it is in: nobody may save or keep that state."""
    (before, error, after), (_, found, held) = ranks.run(2, "train_on_a_nan", **given(broken=moment))
    assert (before, error, after) == (None, None, None)
    assert found is not None and held is not None
    assert "holds a NaN or an infinity after 2 optimizer steps (rank 1)" in found and "actor.optim.lr" in found
    assert held.startswith("model.") and held.endswith("holds a NaN or an infinity")


def test_a_nan_among_the_weights_is_met_before_the_step(ranks, given):
    results = ranks.run(2, "train_on_a_nan", **given(broken="weight"))
    assert all("the gradient norm is nan" in str(error) for _, error, _ in results)
    assert results[1][2] is not None
