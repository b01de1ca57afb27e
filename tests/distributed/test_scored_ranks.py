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
# A prompt of four tokens with two responses, and a sequence of its own.
IDS = torch.tensor([1, 5, 9, 3, 14, 17, 1, 3, 3, 17, 10, 0, 4, 5, 6, 7, 8, 9])
POSITIONS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5])
SEGMENTS = Segments(
    start_S=torch.tensor([0, 4, 8, 12]), stop_S=torch.tensor([4, 8, 12, 18]), parent_S=torch.tensor([-1, 0, 0, -1])
)
SOURCE, TARGETS = torch.tensor([3, 4, 3, 10, 13, 14, 16]), torch.tensor([14, 17, 3, 0, 6, 7, 9])
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
    tokens = FlatTokens.of(IDS, POSITIONS, SEGMENTS)
    given = tokens.ids_N, tokens.positions_N, tokens.layout, SOURCE[mine]
    return root(*given, TARGETS[mine], 0.8, True) if kind == "policy" else (root(*given),)


@pytest.mark.parametrize(
    ("world_size", "kind", "tied", "reshard"),
    [(2, "policy", True, True), (1, "policy", True, True), (2, "policy", False, False), (2, "value", True, True)],
    ids=["tied", "one-rank", "untied", "value"],
)
@pytest.mark.parametrize("param_dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_sharded_values_and_gradients_are_those_of_one_process(run_ranks, world_size, kind, tied, reshard, param_dtype):
    found = run_ranks(shard_and_train, world_size, kind=kind, tied=tied, param_dtype=param_dtype, reshard=reshard)
    torch.set_num_threads(1)
    model = build(kind, tied)
    for param in model.parameters():  # not its buffers: FSDP casts parameters only
        param.data = param.data.to(param_dtype or torch.float32)
    expected = outputs(kind, ScoredModel(model) if kind == "policy" else ValueModel(model), MINE[0])
    sum((value * (1 + i)).sum() for i, value in enumerate(expected)).backward()
    for one, other in zip(found[0][0], expected, strict=True):
        assert torch.equal(one, other)
    assert all(len(value) == 0 for values, _ in found[1:] for value in values)
    names = [name for name, _ in model.named_parameters()]
    for _, gradients in found:
        assert list(gradients) == names
        for name, param in model.named_parameters():
            assert torch.equal(gradients[name], 2 * param.grad.float()), name
