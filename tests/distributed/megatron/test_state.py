"""The state as files in Megatron's layout: a run that is resumed from them continues bit for bit, resharded or not."""

from __future__ import annotations

import io
from collections import OrderedDict

import pytest
import torch

from rlinf_lite.checkpoint import StateMismatch

pytestmark = pytest.mark.xdist_group("megatron")  # one process imports megatron-core

LAYOUTS = [(1, 1), (2, 1), (2, 2)]
QUICK = [("fp16", (2, 2))]  # in bf16: as in fp16, without the scaler
SEQUENCE = "actor.megatron.sequence_parallel"


def decoded(data: bytes):
    return torch.load(io.BytesIO(data), weights_only=False)


def encoded(content) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(
    ("precision", "tensor_parallel", "data_parallel", "sequence_parallel"),
    [
        pytest.param(
            *(precision, *layout, divided),
            marks=[] if (precision, layout) in QUICK and divided else pytest.mark.soak,
        )
        for precision in ("fp32", "bf16", "fp16")
        for layout in LAYOUTS
        for divided in (False, True)[: layout[0]]
    ],
)
def test_a_resumed_run_continues_bit_for_bit(
    ranks, model_dirs, make_config, made_up, precision, tensor_parallel, data_parallel, sequence_parallel
):
    given = {
        "model_dir": model_dirs["qwen2"],
        "config": make_config(tensor_parallel, {"actor.model.precision": precision, SEQUENCE: sequence_parallel}),
        "units": made_up[1],
    }
    size = tensor_parallel * data_parallel
    # A dynamic scale of the loss, at first far too large: most of these steps are skipped.
    num_steps = 22 if precision == "fp16" else 2
    straight = ranks.run(size, "run_straight", **given, num_steps=num_steps)
    files = straight[0]["files"]
    assert sorted(files) == sorted(
        [
            *(f"iter_0000007/mp_rank_{rank:02d}/{name}" for rank in range(tensor_parallel) for name in NAMES),
            "latest_checkpointed_iteration.txt",
        ]
    )
    assert files["latest_checkpointed_iteration.txt"] == b"7"
    resumed = ranks.run(size, "run_on", **given, files=files)
    for before, after in zip(straight, resumed, strict=True):
        assert after["restored"]
        assert_equal(before["end"], after["end"])
        steps, updates, of_adam = after["end"]["steps"].tolist()
        assert steps == of_adam and updates == num_steps + 3
        if precision == "fp16":
            assert 4 < steps < 10 and 2.0**10 < after["end"]["scaler"][0] < 2.0**20
        else:
            assert steps == 4
    assert {name: data for name, data in resumed[0]["files"].items() if data != files[name]} == {}


NAMES = ("model_optim_rng.pt", "distrib_optim.pt")


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.soak), "bf16"])
def test_files_are_resharded_without_loss(ranks, model_dirs, make_config, made_up, precision):
    """Tensor parallel 2 -> 1 -> 2, over other numbers of data-parallel ranks: the same weights and optimizer state."""

    def given(tensor_parallel):
        config = make_config(tensor_parallel, {"actor.model.precision": precision})
        return {"model_dir": model_dirs["qwen3"], "config": config, "units": made_up[1]}

    first = ranks.run(4, "run_straight", **given(2))[0]["files"]
    as_one = ranks.run(2, "run_on", **given(1), files=first)
    assert not any(rank["restored"] for rank in as_one), "these ranks have no RNG state of their own in the files"
    back = ranks.run(2, "run_on", **given(2), files=as_one[0]["files"])
    for rank in (0, 1):
        for name in NAMES:
            path = f"iter_0000007/mp_rank_{rank:02d}/{name}"
            one, other = decoded(first[path]), decoded(back[0]["files"][path])
            assert_equal(tensors_of(one, name), tensors_of(other, name))


@pytest.mark.parametrize("before", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_sequence_parallelism_may_be_turned_on_and_off(ranks, model_dirs, make_config, made_up, before):
    """The state is the same, and it is known that what follows will not be bit-equal."""
    given = {"model_dir": model_dirs["qwen3"], "units": made_up[1]}
    first = ranks.run(2, "run_straight", **given, config=make_config(2, {SEQUENCE: before}))[0]["files"]
    other = ranks.run(2, "run_on", **given, config=make_config(2, {SEQUENCE: not before}), files=first)
    assert not any(rank["restored"] for rank in other)
    for path, data in first.items():
        if (name := path.rpartition("/")[2]) in NAMES:
            assert_equal(tensors_of(decoded(data), name), tensors_of(decoded(other[0]["files"][path]), name))


def tensors_of(content, name):
    if name == "model_optim_rng.pt":
        return {key: value for key, value in content["model"].items() if value is not None}
    ((key, buffer),) = content[0].items()
    assert buffer["numel_unpadded"] == len(buffer["param"]) and key[1] == torch.float32
    return {name: buffer[name] for name in ("param", "exp_avg", "exp_avg_sq")}


def as_transformer_engine(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same state as Megatron writes it with Transformer Engine's layers: norms within them, in another order, and
    nothing of ours.
    """
    made = dict(files)
    for rank in (0, 1):
        paths = [f"iter_0000007/mp_rank_{rank:02d}/{name}" for name in NAMES]
        content, optimizer = (decoded(files[path]) for path in paths)
        del content["rlinf_lite"]
        model = content["model"]
        local = [name for name, value in model.items() if value is not None]
        order = []
        for name in local:
            if not name.endswith((".input_layernorm.weight", ".pre_mlp_layernorm.weight")):
                if name.endswith("linear_qkv.weight"):
                    order.append(name.replace("self_attention.linear_qkv", "input_layernorm"))
                if name.endswith("linear_fc1.weight"):
                    order.append(name.replace("mlp.linear_fc1", "pre_mlp_layernorm"))
                order.append(name)
        assert sorted(order) == sorted(local) and order != local
        fused = {
            name: name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight").replace(
                "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
            )
            for name in order
        }
        content["model"] = OrderedDict((fused[name], model[name]) for name in order)
        ((_, buffer),) = optimizer[0].items()
        for part in ("param", "exp_avg", "exp_avg_sq"):
            buffer[part] = repacked(buffer[part], {name: model[name].numel() for name in local}, order)
        made |= {paths[0]: encoded(content), paths[1]: encoded(optimizer)}
    return made


def repacked(flat, sizes, order):
    """From the order of ``sizes`` to ``order``: written from the documented format, reversed and aligned to 64."""
    values, end = {}, 0
    for name in reversed(list(sizes)):
        start = (end + 63) // 64 * 64
        end = start + sizes[name]
        values[name] = flat[start:end]
    assert end == len(flat)
    made = torch.zeros(0)
    for name in reversed(order):
        made = torch.cat([made, torch.zeros(-len(made) % 64), values[name]])
    return made


def test_files_of_megatron_continue_with_the_same_weights(ranks, model_dirs, make_config, made_up):
    given = {"model_dir": model_dirs["qwen2"], "config": make_config(2), "units": made_up[1]}
    straight = ranks.run(2, "run_straight", **given)
    resumed = ranks.run(2, "run_on", **given, files=as_transformer_engine(straight[0]["files"]))
    for before, after in zip(straight, resumed, strict=True):
        assert not after["restored"]
        assert after["end"]["steps"].tolist() == [4, 4, 4]  # of skipped steps such files say nothing
        state = {name: value for name, value in before["end"].items() if name not in ("rng", "steps")}
        assert_equal(state, {name: after["end"][name] for name in state})


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.soak), "bf16"])
def test_weights_alone(ranks, model_dirs, make_config, made_up, precision):
    given = {
        "model_dir": model_dirs["llama"],
        "config": make_config(2, {"actor.model.precision": precision}),
        "units": made_up[1],
    }
    straight = ranks.run(4, "run_straight", **given)
    loaded = ranks.run(4, "load_weights", **given, files=straight[0]["files"])
    untrained = ranks.run(4, "pass_and_step", **given, num_steps=0)[0]["whole"]
    for rank in loaded:
        assert rank["steps"] == 1
        changed = [name for name, tensor in untrained.items() if not torch.equal(rank["weights"][name], tensor)]
        assert len(changed) == len(untrained), "the weights are those of the directory"
        for name, tensor in rank["moved"].items():  # by a step of Adam, from there
            assert (tensor - rank["weights"][name]).abs().max() < 0.05


def test_another_model_or_type_is_refused(ranks, model_dirs, make_config, made_up):
    given = {"config": make_config(2), "units": made_up[1]}
    files = ranks.run(2, "run_straight", **given, model_dir=model_dirs["qwen2"])[0]["files"]
    with pytest.raises(StateMismatch, match=r"another model: .*linear_qkv.weight is \[32, 32\], the model.s is \[48"):
        ranks.run(2, "run_on", **given, model_dir=model_dirs["qwen3"], files=files)
    other = {"config": make_config(2, {"actor.model.precision": "bf16"}), "units": made_up[1]}
    with pytest.raises(StateMismatch, match=r"parameters are torch.float32, the model's are torch.bfloat16"):
        ranks.run(2, "run_on", **other, model_dir=model_dirs["qwen2"], files=files)
