"""The Megatron trainer against transformers' own model in float64: log-probs, gradients, optimizer steps."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from rlinf_lite.models.head import MIN_ROWS
from rlinf_lite.weights.pieces import join_rows

pytestmark = pytest.mark.xdist_group("megatron")  # one process imports megatron-core

NUM_STEPS = 3
SEQUENCE = "actor.megatron.sequence_parallel"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


LAYOUTS = [((1, 1), False), ((2, 1), False), ((1, 2), False), ((2, 2), False), ((2, 1), True), ((2, 2), True)]
"""Tensor-parallel and data-parallel ranks, and sequence parallelism."""


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        ("qwen3", [((1, 1), False), ((2, 2), True)]),
        ("qwen2", [((2, 1), True)]),
        pytest.param("qwen3", LAYOUTS, marks=pytest.mark.soak),
        pytest.param("qwen2", LAYOUTS, marks=pytest.mark.soak),
        pytest.param("llama", LAYOUTS, marks=pytest.mark.soak),
    ],
)
def test_ranks_compute_what_transformers_does(ranks, model_dirs, make_config, made_up, reference, kind, layouts):
    groups, units, weight = made_up
    wanted = reference(model_dirs[kind], make_config(1), groups, weight, NUM_STEPS)
    assert wanted["norms"][0] > 0.5, "nothing would be clipped"
    assert any(len(unit.ids_N) % 2 for unit in units if len(unit.ids_N) > MIN_ROWS), "nothing would be padded"
    for (tensor_parallel, data_parallel), sequence_parallel in layouts:
        config = make_config(tensor_parallel, {SEQUENCE: sequence_parallel})
        found = ranks.run(
            tensor_parallel * data_parallel,
            "pass_and_step",
            model_dir=model_dirs[kind],
            config=config,
            units=units,
            num_steps=NUM_STEPS,
        )
        check(found, wanted, tensor_parallel, [unit.index for unit in units])


@pytest.mark.parametrize(
    "kind",
    [
        "linear",
        "yarn",
        pytest.param("yarn mscale", marks=pytest.mark.soak),
        pytest.param("yarn factor", marks=pytest.mark.soak),
        "as for Qwen2.5",
    ],
)
def test_scaled_rotary_embeddings(ranks, model_dirs, make_config, made_up, reference, tmp_path, kind):
    groups, units, weight = made_up
    model_dir = model_dirs[kind] if kind in model_dirs else as_for_qwen(model_dirs["yarn"], tmp_path)
    rope = AutoConfig.from_pretrained(model_dir).rope_parameters
    assert rope["rope_type"] == ("linear" if kind == "linear" else "yarn")
    longest = max(len(group.prompt.problem.prompt_ids) for group in groups)
    assert longest > rope.get("original_max_position_embeddings", 0), "not longer than before"
    config = make_config(2, {"actor.optim.adam_eps": 1e-3})  # the gradients are larger, and so is their rounding
    wanted = reference(model_dir, config, groups, weight, num_steps=1)
    given = {"model_dir": model_dir, "config": config, "units": units, "num_steps": 1}
    check(ranks.run(2, "pass_and_step", **given), wanted, 2, [unit.index for unit in units])


def as_for_qwen(model_dir, directory):
    """With the entry of ``config.json`` that the model cards of Qwen2.5 ask to add for long texts."""
    shutil.copytree(model_dir, directory, dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = {"factor": 4.0, "original_max_position_embeddings": 8, "type": "yarn"}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def check(found, wanted, tensor_parallel, indices):
    logprobs = {index: values for rank in found for index, values in rank["logprobs"].items()}
    for first in range(0, len(found), tensor_parallel):
        one, *others = found[first : first + tensor_parallel]
        for other in others:  # ranks with the same units say the same, bit for bit
            assert all(np.array_equal(one["logprobs"][index], other["logprobs"][index]) for index in one["logprobs"])
            assert one["losses"] == other["losses"]
    joined = torch.from_numpy(np.concatenate([logprobs[index] for index in indices])).double()
    torch.testing.assert_close(joined, wanted["logprobs"], rtol=0, atol=1e-5)
    losses = {index: loss for rank in found for index, loss in rank["losses"].items()}
    assert sum(losses[index] for index in indices) == pytest.approx(wanted["loss"], rel=1e-4, abs=1e-5)
    for rank in found:
        assert rank["norms"] == found[0]["norms"]
        assert rank["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
    for name, gradient in wanted["gradients"].items():
        error = (found[0]["gradients"][name].double() - gradient).norm() / gradient.norm()
        assert error < 1e-5, (name, float(error))
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted["weights"].items()}
    rows = dict(join_rows([piece for rank in found for piece in rank["rows"]], shapes))
    for name, tensor in wanted["weights"].items():
        for rank in found:
            assert torch.equal(rank["whole"][name], rows[name])
        torch.testing.assert_close(rows[name].double(), tensor, **TOLERANCE)


def test_sequence_parallelism_changes_no_bit_of_a_logprob(ranks, model_dirs, make_config, made_up):
    """Of two ranks: a sum of two has one order. Padding to a multiple of them is seen by nobody."""
    given = {"model_dir": model_dirs["qwen3"], "units": made_up[1], "num_steps": 0}
    whole = ranks.run(2, "pass_and_step", **given, config=make_config(2))
    divided = ranks.run(2, "pass_and_step", **given, config=make_config(2, {SEQUENCE: True}))
    for one, other in zip(whole, divided, strict=True):
        assert one["logprobs"].keys() == other["logprobs"].keys()
        assert all(np.array_equal(values, other["logprobs"][index]) for index, values in one["logprobs"].items())


def test_sequence_parallelism_keeps_fewer_activations(ranks, model_dirs, make_config, made_up):
    given = {"model_dir": model_dirs["qwen2"], "units": made_up[1]}
    whole = ranks.run(2, "bytes_for_backward", **given, config=make_config(2))
    divided = ranks.run(2, "bytes_for_backward", **given, config=make_config(2, {SEQUENCE: True}))
    # Of each layer the inputs of two norms and two products, float32 [N, D]; the rest is divided by heads and columns.
    model, num_tokens = AutoConfig.from_pretrained(model_dirs["qwen2"]), sum(len(unit.ids_N) for unit in made_up[1])
    of_layers = model.num_hidden_layers * 4 * num_tokens * model.hidden_size * 4
    for one, other in zip(whole, divided, strict=True):
        assert one - other >= of_layers / 2


@pytest.mark.parametrize("sequence_parallel", [pytest.param(False, marks=pytest.mark.soak), True])
def test_recomputed_activations_change_no_bit(ranks, model_dirs, make_config, made_up, sequence_parallel):
    _, units, _ = made_up
    given = {"model_dir": model_dirs["qwen3"], "units": units, "num_steps": 2}
    kept = ranks.run(2, "pass_and_step", **given, config=make_config(2, {SEQUENCE: sequence_parallel}))
    one_layer = {"actor.megatron.recompute_granularity": "full", "actor.megatron.recompute_num_layers": 1}
    recompute = make_config(2, {**one_layer, SEQUENCE: sequence_parallel})
    recomputed = ranks.run(2, "pass_and_step", **given, config=recompute)
    for one, other in zip(kept, recomputed, strict=True):
        assert one["norms"] == other["norms"]
        assert all(torch.equal(one["whole"][name], tensor) for name, tensor in other["whole"].items())


def test_a_rank_may_hold_padding_only(ranks, model_dirs, make_config, made_up):
    """50 tokens in 256 rows: the second rank has none of them."""
    _, units, _ = made_up
    given = {"model_dir": model_dirs["llama"], "units": units, "num_steps": 2}
    divided = ranks.run(2, "pass_and_step", **given, config=make_config(2))
    padded = make_config(2, {"actor.megatron.make_vocab_size_divisible_by": 128})
    for one, other in zip(divided, ranks.run(2, "pass_and_step", **given, config=padded), strict=True):
        assert one["norms"] == pytest.approx(other["norms"], rel=1e-5)
        for name, tensor in one["whole"].items():
            torch.testing.assert_close(tensor, other["whole"][name], **TOLERANCE)
