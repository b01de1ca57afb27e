"""Hugging Face directories of well-known shapes with random weights and the embedded model's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from rlinf_lite.models import hf_directory

SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "tiny": (
        "qwen2",
        {
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 512,
        },
    ),
    "qwen2.5-0.5b": (
        "qwen2",
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    ),
    "qwen2.5-1.5b": (
        "qwen2",
        {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    ),
}


def config_of(shape: str) -> PreTrainedConfig:
    """The model config of a name in `SHAPES`."""
    ids = AutoConfig.from_pretrained(hf_directory.resolve("embedded:tiny-arithmetic"))
    model_type, sizes = SHAPES[shape]
    common: dict[str, Any] = {
        "vocab_size": 151_936,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32_768,
        **{name: getattr(ids, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    return AutoConfig.for_model(model_type, **{**common, **sizes})


def make(shape: str, device: str = "cpu") -> torch.nn.Module:
    """A model in bf16, always with the same weights on the same kind of device."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16)


def save(shape: str, directory: Path, device: str = "cpu") -> Path:
    """Write model and tokenizer into ``directory``; returns it."""
    make(shape, device).save_pretrained(directory)
    for file in hf_directory.resolve("embedded:tiny-arithmetic").iterdir():
        if file.name.startswith(("tokenizer", "special", "chat")):
            shutil.copy(file, directory)
    return directory
