"""``strategy: fsdp`` (FSDP1): gradients as FSDP2, the same weights for engines, and checkpoints of one form."""

from __future__ import annotations

import pytest
import torch

from rlinf_lite.weights.pieces import join_rows

STRATEGIES = ("fsdp2", "fsdp")


@pytest.fixture
def given(model_dirs, groups, advantages, make_config):
    def make(strategy, changes=None, **others):
        config = make_config({"actor.fsdp_config.strategy": strategy, **(changes or {})})
        return {
            "model_dir": model_dirs["llama"],
            "config": config,
            "groups": groups,
            "advantages": advantages,
            **others,
        }

    return make


@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.soak), 1])
@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        pytest.param(writer, reader, marks=[] if writer != reader else pytest.mark.soak)
        for writer in STRATEGIES
        for reader in STRATEGIES
    ],
)
def test_either_loads_what_the_other_wrote(ranks, given, assert_same_state, tmp_path, writer, reader, num_ranks):
    """A load checks names, shapes and types. 20 x 37 weights in 2 layers: slices do not end where rows do."""
    written = ranks.run(2, "train_and_save", **given(writer), root=str(tmp_path), steps=range(1, 3), save_after=2)[0]
    loaded = {"root": str(tmp_path), "steps": range(0), "load": written["path"]}
    for read in ranks.run(num_ranks, "train_and_save", **given(reader), **loaded):
        assert_same_state(written, read)
        assert read["digest"] == written["digest"]
    assert written["num_updates"] == 2 and all(moments["step"] == 2 for moments in written["optim"].values())


@pytest.mark.parametrize("num_ranks", [2, pytest.param(1, marks=pytest.mark.soak)])
def test_gradients_are_those_of_fsdp2(ranks, given, num_ranks):
    """Adam's first moment is 0.1 times the gradient after one step."""
    one, other = (ranks.run(num_ranks, "train", **given(strategy))[0] for strategy in STRATEGIES)
    gradient, expected = (
        torch.cat([moments["exp_avg"].flatten() for moments in result["optim"].values()]) for result in (other, one)
    )
    assert expected.norm() > 0
    assert (gradient - expected).norm() < 1e-6 * expected.norm()
    assert other["reports"][0].grad_norm == pytest.approx(one["reports"][0].grad_norm, rel=1e-6)


def test_activations_computed_again_and_bf16(ranks, given, assert_same_state):
    changes = {"actor.fsdp_config.mixed_precision.param_dtype": "bf16"}
    again = {**changes, "actor.fsdp_config.gradient_checkpointing": True}
    one, other = (ranks.run(2, "train", **given("fsdp", each, num_steps=2))[0] for each in (changes, again))
    assert_same_state(one, other)
    assert one["dtypes"] == {torch.float32}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_engines_get_the_same_form_of_weights(ranks, given, strategy):
    both = ranks.run(2, "published", **given(strategy, dtype=torch.float32, one_group=False))
    weights = both[0]["model"]
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    joined = dict(join_rows([piece for rank in both for piece in rank["local"]], shapes))
    assert list(shapes) == [piece.name for piece in both[0]["local"]]
    for rank in both:
        for name, first_row, tensor in rank["whole"]:
            assert first_row == 0 and torch.equal(tensor, weights[name]) and torch.equal(joined[name], weights[name])


@pytest.mark.parametrize("num_ranks", [2, pytest.param(1, marks=pytest.mark.soak)])
def test_a_self_check_finds_nothing_and_changes_nothing(ranks, given, assert_same_state, num_ranks):
    one, other = (
        ranks.run(num_ranks, "train_and_check", **given("fsdp"), checks=checks)[0] for checks in (False, True)
    )
    assert_same_state(one, other)
    assert [check.difference for check in other["checks"]] == [None, None]
