"""`ScoredModel` and `ValueModel` as the root that FSDP2 shards, on two ranks."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from rlinf_lite.models.scored import ScoredModel, ValueModel
from rlinf_lite.models.segments import FlatTokens
from rlinf_lite.models.shard import blocks
from rlinf_lite.types import Segments

SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "classifier_dropout": 0.0,
    "num_labels": 1,
}
IDS = torch.tensor([[1, 5, 9, 3, 14, 17], [1, 3, 3, 17, 10, 0], [4, 5, 6, 7, 8, 9]])
ROWS, COLUMNS = torch.tensor([0, 0, 1, 1, 2, 2, 2]), torch.tensor([2, 3, 0, 3, 1, 2, 4])
SOURCE, TARGETS = ROWS * 6 + COLUMNS, IDS[ROWS, COLUMNS + 1]
MINE = [torch.tensor([0, 1, 2, 3, 4, 5, 6]), torch.tensor([], dtype=torch.int64)]
"""The loss tokens of each rank: the second has none, and takes part in the collectives only."""


def shard_and_train(rank, world_size, kind, tied, param_dtype, reshard):
    """Forward and backward on this rank's loss tokens: what the root returned, the whole gradients, the names."""
    torch.set_num_threads(1)
    model = build(kind, tied)
    root = ScoredModel(model) if kind == "policy" else ValueModel(model)
    mesh = init_device_mesh("cpu", (world_size,))
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*blocks(model), root):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    values = []
    for _ in range(2):  # gradients add up over the units of a mini-batch
        values = outputs(kind, root, MINE[rank])
        sum((value * (1 + i)).sum() for i, value in enumerate(values)).backward()
    params = dict(model.named_parameters())
    assert all(isinstance(param, DTensor) for param in params.values())
    return [value.detach() for value in values], {name: param.grad.full_tensor() for name, param in params.items()}


def build(kind, tied):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=tied)
    auto = AutoModelForCausalLM if kind == "policy" else AutoModelForTokenClassification
    return auto.from_config(config, dtype=torch.float32)


def outputs(kind, root, mine):
    starts = torch.tensor([0, 6, 12])
    rows = Segments(start_S=starts, stop_S=starts + 6, parent_S=torch.full((3,), -1))
    tokens = FlatTokens.of(IDS.flatten(), torch.arange(6).repeat(3), rows)
    given = tokens.ids_N, tokens.positions_N, tokens.layout, SOURCE[mine]
    return root(*given, TARGETS[mine], 0.8, True) if kind == "policy" else (root(*given),)


@pytest.mark.parametrize(
    ("kind", "tied", "reshard"),
    [("policy", True, True), ("policy", False, False), ("value", True, True)],
    ids=["tied", "untied", "value"],
)
@pytest.mark.parametrize("param_dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_sharded_values_and_gradients_are_those_of_one_process(run_ranks, kind, tied, reshard, param_dtype):
    found = run_ranks(shard_and_train, 2, kind=kind, tied=tied, param_dtype=param_dtype, reshard=reshard)
    torch.set_num_threads(1)
    model = build(kind, tied)
    for param in model.parameters():  # not its buffers: FSDP casts parameters only
        param.data = param.data.to(param_dtype or torch.float32)
    expected = outputs(kind, ScoredModel(model) if kind == "policy" else ValueModel(model), MINE[0])
    sum((value * (1 + i)).sum() for i, value in enumerate(expected)).backward()
    for one, other in zip(found[0][0], expected, strict=True):
        assert torch.equal(one, other)
    assert [len(value) for value in found[1][0]] == [0] * len(expected)
    names = [name for name, _ in model.named_parameters()]
    for _, gradients in found:
        assert list(gradients) == names
        for name, param in model.named_parameters():
            assert torch.equal(gradients[name], 2 * param.grad.float()), name
