"""Tensors of one tensor-parallel rank of Megatron's GPTModel (local spec) <-> Hugging Face tensors, without loss.

Queries, keys and values are one matrix, a query group after the other: [its queries, its key, its value]. Gate and up
projection are one matrix on each rank: [gate_r; up_r]. Embedding and output layer are split by rows of the padded
vocabulary, qkv and fc1 by rows, proj and fc2 by columns; norms are on every rank. What holds for the weights holds for
whatever has their shape: gradients, optimizer state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from rlinf_lite.weights.megatron.architecture import VOCAB_DIVISOR, Architecture

Kind = Literal["vocab", "qkv", "gate_up", "columns", "whole"]
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
_HEAD_NORMS = ("q_layernorm.weight", "k_layernorm.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One tensor of Megatron's model."""

    name: str
    """As Megatron calls it."""
    sources: tuple[str, ...]
    """The Hugging Face tensors that it is made of, in order."""
    kind: Kind
    """How it is made of them and divided over ranks."""

    @property
    def is_sharded(self) -> bool:
        """Whether each tensor-parallel rank has its own part; else all have the same values."""
        return self.kind != "whole"

    @property
    def is_head_norm(self) -> bool:
        """Whether it is a norm of queries or keys: on every rank, but each uses it for its own heads only."""
        return self.name.endswith(_HEAD_NORMS)


def weights(arch: Architecture) -> list[Weight]:
    """Every parameter, in the order of Megatron's ``named_parameters()``."""
    found = [Weight(name=EMBEDDING, sources=("model.embed_tokens.weight",), kind="vocab")]
    for layer in range(arch.num_layers):
        found += _layer_weights(arch, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    found.append(Weight(name="decoder.final_layernorm.weight", sources=("model.norm.weight",), kind="whole"))
    if not arch.tied:
        found.append(Weight(name=OUTPUT, sources=("lm_head.weight",), kind="vocab"))
    return found


def _layer_weights(arch: Architecture, ours: str, theirs: str) -> list[Weight]:
    def qkv(part: str) -> Weight:
        sources = tuple(f"{theirs}self_attn.{x}_proj.{part}" for x in "qkv")
        return Weight(name=f"{ours}self_attention.linear_qkv.{part}", sources=sources, kind="qkv")

    def single(name: str, source: str, kind: Kind = "whole") -> Weight:
        return Weight(name=f"{ours}{name}.weight", sources=(f"{theirs}{source}.weight",), kind=kind)

    gate_up = tuple(f"{theirs}mlp.{x}_proj.weight" for x in ("gate", "up"))
    return [
        single("input_layernorm", "input_layernorm"),
        single("self_attention.linear_proj", "self_attn.o_proj", "columns"),
        *(qkv(part) for part in (("weight", "bias") if arch.qkv_bias else ("weight",))),
        *(single(f"self_attention.{x}_layernorm", f"self_attn.{x}_norm") for x in "qk" if arch.qk_norm),
        single("pre_mlp_layernorm", "post_attention_layernorm"),
        Weight(name=f"{ours}mlp.linear_fc1.weight", sources=gate_up, kind="gate_up"),
        single("mlp.linear_fc2", "mlp.down_proj", "columns"),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """How one architecture is divided over tensor-parallel ranks."""

    arch: Architecture
    size: int
    """Tensor-parallel ranks."""
    padded_vocab_size: int

    @classmethod
    def of(cls, arch: Architecture, size: int, divisor: int = VOCAB_DIVISOR) -> Partition:
        """
        Args:
            divisor: Megatron's ``make_vocab_size_divisible_by``.
        """
        return cls(arch=arch, size=size, padded_vocab_size=arch.padded_vocab_size(size, divisor))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each parameter of one rank, in the order of Megatron's ``named_parameters()``."""
        return {weight.name: self.shape(weight) for weight in weights(self.arch)}

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """The shape on one rank."""
        arch, hidden = self.arch, self.arch.hidden_size
        if weight.kind == "whole":
            return (arch.head_dim if weight.is_head_norm else hidden,)
        if weight.kind == "columns":
            inner = arch.ffn_size if "linear_fc2" in weight.name else arch.num_heads * arch.head_dim
            return hidden, inner // self.size
        rows = {
            "vocab": self.padded_vocab_size,
            "qkv": (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim,
            "gate_up": 2 * arch.ffn_size,
        }[weight.kind]
        return (rows // self.size,) if weight.name.endswith("bias") else (rows // self.size, hidden)

    def shard(self, weight: Weight, sources: Sequence[Tensor], rank: int) -> Tensor:
        """The part of a tensor that one rank holds.

        Args:
            sources: the Hugging Face tensors `Weight.sources`, whole.
        """
        if weight.kind == "whole":
            return sources[0]
        if weight.kind == "vocab":
            padding = self.padded_vocab_size - self.arch.vocab_size
            return _part(functional.pad(sources[0], (0, 0, 0, padding)), 0, self.size, rank)
        if weight.kind == "columns":
            return _part(sources[0], 1, self.size, rank)
        if weight.kind == "gate_up":
            return torch.cat([_part(source, 0, self.size, rank) for source in sources])
        groups = [source.unflatten(0, (self.arch.num_kv_heads, -1)) for source in sources]
        return _part(torch.cat(groups, 1).flatten(0, 1), 0, self.size, rank)

    def join(self, weight: Weight, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """The Hugging Face tensors that the parts of all ranks make; drops the rows that pad the vocabulary."""
        if weight.kind == "whole":
            parts = [shards[0]]
        elif weight.kind == "vocab":
            parts = [torch.cat(list(shards))[: self.arch.vocab_size]]
        elif weight.kind == "columns":
            parts = [torch.cat(list(shards), 1)]
        elif weight.kind == "gate_up":
            gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
            parts = [torch.cat(gates), torch.cat(ups)]
        else:
            arch = self.arch
            groups = torch.cat(list(shards)).unflatten(0, (arch.num_kv_heads, -1))
            queries = arch.num_heads // arch.num_kv_heads * arch.head_dim
            parts = [part.flatten(0, 1) for part in groups.split([queries, arch.head_dim, arch.head_dim], 1)]
        return dict(zip(weight.sources, parts, strict=True))


def to_megatron(partition: Partition, tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """All tensors of one rank, from whole Hugging Face tensors by name; maybe views of them."""
    return {
        weight.name: partition.shard(weight, [tensors[name] for name in weight.sources], rank)
        for weight in weights(partition.arch)
    }


def to_hugging_face(partition: Partition, ranks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All Hugging Face tensors, from the tensors of every rank by Megatron's names; tied ones once."""
    found: dict[str, Tensor] = {}
    for weight in weights(partition.arch):
        found |= partition.join(weight, [rank[weight.name] for rank in ranks])
    return found


def _part(tensor: Tensor, dim: int, size: int, rank: int) -> Tensor:
    return tensor.tensor_split(size, dim)[rank]
