"""Tiny models of several architectures, saved as ordinary Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": {**COMMON, "tie_word_embeddings": True},
    "gpt2": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 2},
    "qwen2": {**COMMON, "tie_word_embeddings": False},
    "qwen3": {**COMMON, "tie_word_embeddings": True},
    "gemma2": {**COMMON, "sliding_window": 8},
}


@pytest.fixture(scope="session")
def tiny_model():
    def make(model_type: str, **changes):
        """A random model; 0.2 instead of 0.02, so that a weight in the wrong place shows in the logits."""
        torch.manual_seed(7)
        config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], "initializer_range": 0.2, **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for param in model.parameters():  # norms and biases are ones and zeros: make them matter
                param.add_(torch.randn_like(param) * 0.05)
        return model.eval()

    return make


@pytest.fixture
def tiny_directory(tiny_model, tmp_path):
    def make(model_type: str, *, name: str | None = None, max_shard_size: str = "1GB", **changes) -> Path:
        directory = tmp_path / (name or model_type)
        tiny_model(model_type, **changes).save_pretrained(directory, max_shard_size=max_shard_size)
        return directory

    return make
