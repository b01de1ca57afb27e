"""What decides names, shapes and order of Megatron's tensors: a few numbers of a Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from rlinf_lite.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VOCAB_DIVISOR = 128
"""Megatron's default of ``make_vocab_size_divisible_by``."""
_TYPES = ("llama", "qwen2", "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Whose frequencies are constants: those of ``dynamic`` and ``longrope`` depend on the longest sequence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A dense decoder: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """Tokens with an embedding; Megatron pads it."""
    tied: bool
    """The output layer is the embedding."""
    qkv_bias: bool
    qk_norm: bool
    """Queries and keys have a norm of their own, as in Qwen 3."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> Self:
        """
        Raises:
            ConfigError: the model is not one of those that are mapped; says why.
        """
        if (reason := _unsupported(config)) is not None:
            raise ConfigError(
                f"the Megatron backend does not have {reason}",
                key="actor.model.model_path (model_type)",
                value=config.model_type,
                remedy=f"choose a dense model of the types {', '.join(_TYPES)}, or actor.training_backend=fsdp",
            )
        heads = config.num_attention_heads
        return cls(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            ffn_size=config.intermediate_size,
            num_heads=heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            tied=config.tie_word_embeddings,
            qkv_bias=config.model_type == "qwen2",
            qk_norm=config.model_type == "qwen3",
        )

    def padded_vocab_size(self, tensor_parallel: int, divisor: int = VOCAB_DIVISOR) -> int:
        """Rows of the embedding over all tensor-parallel ranks: a multiple of ``divisor * tensor_parallel``."""
        multiple = divisor * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple

    def check_tensor_parallel(self, tensor_parallel: int) -> None:
        """
        Raises:
            ConfigError: the layers cannot be divided over so many ranks.
        """
        for what, size in (("key-value heads", self.num_kv_heads), ("intermediate_size", self.ffn_size)):
            if size % tensor_parallel:
                raise ConfigError(
                    f"it must divide the model's {what} ({size})",
                    key="actor.megatron.tensor_model_parallel_size",
                    value=tensor_parallel,
                    remedy=f"use a divisor of {size}",
                )


def _unsupported(config: PretrainedConfig) -> str | None:
    """What the model has that is not mapped; None if nothing."""
    if config.model_type not in _TYPES:
        return f"models of the type {config.model_type}"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act} in a gated layer"
    if getattr(config, "mlp_bias", False):
        return "biases in the gated layer (mlp_bias)"
    if config.model_type != "qwen2" and getattr(config, "attention_bias", False):
        return "a bias after attention (attention_bias)"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "sliding-window attention"
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        return f"rotary embeddings of the type {rope} (there are {', '.join(_ROPE_TYPES)})"
    return None
