"""Hugging Face tensors become those of Megatron's ranks, and come back bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from rlinf_lite.errors import ConfigError
from rlinf_lite.models.build import build_on_meta
from rlinf_lite.weights.megatron.architecture import Architecture
from rlinf_lite.weights.megatron.mapping import Partition, to_hugging_face, to_megatron, weights
from rlinf_lite.weights.names import weight_shapes

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama wide heads": LlamaConfig(**SIZES, head_dim=10, tie_word_embeddings=True),
    "qwen2 tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=10, tie_word_embeddings=False),
}


def random_tensors(config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = weight_shapes(build_on_meta(config, "fp32"))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", CONFIGS)
def test_to_megatron_and_back_is_equal(kind, size):
    config = CONFIGS[kind]
    tensors, partition = random_tensors(config), Partition.of(Architecture.of(config), size)
    ranks = [to_megatron(partition, tensors, rank) for rank in range(size)]
    for rank in ranks:
        assert {name: tuple(tensor.shape) for name, tensor in rank.items()} == partition.shapes()
    back = to_hugging_face(partition, ranks)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_ranks_hold_what_megatron_documents():
    """Written out by hand for one layer: whole query groups, gate over up, columns, padded rows of the vocabulary."""
    config = CONFIGS["qwen2 tied"]
    partition = Partition.of(Architecture.of(config), 2, divisor=16)
    tensors = random_tensors(config)
    held = to_megatron(partition, tensors, 1)
    q, k, v = (tensors[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv")
    bias_q, bias_k, bias_v = (tensors[f"model.layers.0.self_attn.{x}_proj.bias"] for x in "qkv")
    gate, up = (tensors[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    embedding = tensors["model.embed_tokens.weight"]
    layer = {
        name.removeprefix("decoder.layers.0."): value for name, value in held.items() if name.startswith("decoder.l")
    }
    # heads of 6 rows: rank 1 has query heads 2 and 3 with the key and the value of group 1
    assert torch.equal(layer["self_attention.linear_qkv.weight"], torch.cat([q[12:], k[6:], v[6:]]))
    assert torch.equal(layer["self_attention.linear_qkv.bias"], torch.cat([bias_q[12:], bias_k[6:], bias_v[6:]]))
    assert torch.equal(
        layer["self_attention.linear_proj.weight"], tensors["model.layers.0.self_attn.o_proj.weight"][:, 12:]
    )
    assert torch.equal(layer["mlp.linear_fc1.weight"], torch.cat([gate[20:], up[20:]]))
    assert torch.equal(layer["mlp.linear_fc2.weight"], tensors["model.layers.0.mlp.down_proj.weight"][:, 20:])
    assert partition.padded_vocab_size == 64
    assert torch.equal(held["embedding.word_embeddings.weight"], torch.cat([embedding[32:], torch.zeros(14, 24)]))
    assert "output_layer.weight" not in held


def test_one_rank_with_two_groups_has_them_one_after_the_other():
    config = CONFIGS["llama"]
    tensors = random_tensors(config)
    held = to_megatron(Partition.of(Architecture.of(config), 1), tensors, 0)
    q, k, v = (tensors[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    wanted = torch.cat([q[:12], k[:6], v[:6], q[12:], k[6:], v[6:]])
    assert torch.equal(held["decoder.layers.1.self_attention.linear_qkv.weight"], wanted)


def test_only_norms_are_on_every_rank():
    names = [weight.name for weight in weights(Architecture.of(CONFIGS["qwen3"])) if not weight.is_sharded]
    assert len(names) == 2 * 4 + 1
    assert all("norm" in name for name in names)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(**SIZES), "models of the type mistral"),
        (Qwen2Config(**SIZES, rope_parameters=DYNAMIC), "rotary embeddings of the type dynamic"),
        (LlamaConfig(**SIZES, rope_parameters=LONG), "rotary embeddings of the type longrope"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "the activation gelu"),
        (LlamaConfig(**SIZES, mlp_bias=True), "mlp_bias"),
        (Qwen3Config(**SIZES, attention_bias=True), "attention_bias"),
        (Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=0), "sliding-window"),
    ],
)
def test_what_is_not_mapped_is_refused(config, reason):
    with pytest.raises(ConfigError, match=reason):
        Architecture.of(config)


@pytest.mark.parametrize(("size", "reason"), [(4, r"key-value heads \(2\)"), (3, "key-value heads")])
def test_a_size_that_does_not_divide_is_refused(size, reason):
    with pytest.raises(ConfigError, match=reason):
        Architecture.of(CONFIGS["llama"]).check_tensor_parallel(size)
