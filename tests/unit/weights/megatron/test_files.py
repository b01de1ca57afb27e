"""Files in Megatron's layout are read as any partition holds them, and what is not read is refused by name."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from transformers import Qwen2Config

from rlinf_lite.checkpoint import DamagedCheckpoint, StateMismatch
from rlinf_lite.models.build import build_on_meta
from rlinf_lite.weights.megatron.architecture import Architecture
from rlinf_lite.weights.megatron.files import PARTS, MegatronFiles, rank_file
from rlinf_lite.weights.megatron.mapping import Partition, to_megatron, weights
from rlinf_lite.weights.megatron.packing import pack
from rlinf_lite.weights.names import weight_shapes

CONFIG = Qwen2Config(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
ARCH = Architecture.of(CONFIG)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = weight_shapes(build_on_meta(CONFIG, "fp32"))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


OF_PART = {part: tensors(seed) for seed, part in enumerate(PARTS)}


@pytest.fixture
def files():
    """The files of two ranks; weights are the optimizer's parameters."""
    partition, made = Partition.of(ARCH, 2, divisor=4), {"latest_checkpointed_iteration.txt": b"5"}
    for rank in (0, 1):
        held = {part: to_megatron(partition, values, rank) for part, values in OF_PART.items()}
        flat = {part: pack(values, partition.shapes()) for part, values in held.items()}
        made[rank_file(5, rank, "distrib_optim.pt")] = {
            "buckets_coalesced": True,
            0: {(torch.float32, torch.float32): {**flat, "numel_unpadded": len(flat["param"])}},
        }
        made[rank_file(5, rank, "model_optim_rng.pt")] = {
            "model": OrderedDict(held["param"]),
            "optimizer": {"optimizer": {"param_groups": [{"step": 9, "lr": 0.1}, {"step": 9, "lr": 0.1}]}},
        }
    return made


def read(made):
    return MegatronFiles(made.keys(), made.__getitem__, ARCH)


@pytest.mark.parametrize(("size", "divisor"), [(1, 4), (2, 4), (1, 128), (2, 128)])
def test_any_partition_reads_them(files, size, divisor):
    target, found = Partition.of(ARCH, size, divisor), read(files)
    for rank in range(size):
        for weight in weights(ARCH):
            for part in PARTS:
                wanted = to_megatron(target, OF_PART[part], rank)[weight.name]
                assert torch.equal(found.optimizer(part, weight, target, rank), wanted)
            wanted = to_megatron(target, OF_PART["param"], rank)[weight.name]
            assert torch.equal(found.parameter(weight, target, rank), wanted)
    assert (found.num_optimizer_steps, found.learning_rate) == (9, 0.1)


def test_what_is_not_there_is_named(files):
    del files[rank_file(5, 1, "distrib_optim.pt")]
    with pytest.raises(DamagedCheckpoint, match=r"iter_0000005 lacks mp_rank_01/distrib_optim.pt"):
        read(files)
    with pytest.raises(StateMismatch, match="0 directories iter_N"):
        read({"latest_checkpointed_iteration.txt": b"5"})


def test_pipeline_parallelism_is_refused(files):
    files = {name.replace("mp_rank_00", "mp_rank_00_000"): content for name, content in files.items()}
    with pytest.raises(StateMismatch, match="pipeline and expert parallelism are not supported"):
        read(files)


def test_other_gaps_are_refused(files):
    buffer = files[rank_file(5, 0, "distrib_optim.pt")][0]
    for part in PARTS:
        buffer[(torch.float32, torch.float32)][part] = torch.zeros(7)
    with pytest.raises(StateMismatch, match=r"has 7 floats, the parameters take .* overlap_grad_reduce"):
        read(files).optimizer("param", weights(ARCH)[0], Partition.of(ARCH, 1), 0)


def test_several_models_are_refused(files):
    path = rank_file(5, 0, "distrib_optim.pt")
    files[path] = [files[path]]  # as Megatron chains the optimizers of experts
    with pytest.raises(StateMismatch, match="only dense models"):
        read(files).optimizer("param", weights(ARCH)[0], Partition.of(ARCH, 1), 0)


def test_groups_that_disagree_are_damaged(files):
    groups = files[rank_file(5, 0, "model_optim_rng.pt")]["optimizer"]["optimizer"]["param_groups"]
    groups[1]["step"] = 8
    with pytest.raises(DamagedCheckpoint, match="do not have one step"):
        _ = read(files).num_optimizer_steps
