"""Hugging Face directories of well-known shapes with random weights, with the embedded tokenizer or one of words."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

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
    "smollm2-135m": (
        "llama",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49_152,
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


def config_of(shape: str, **others: int) -> PreTrainedConfig:
    """The model config of a name in `SHAPES`; ``others`` replace sizes."""
    ids = AutoConfig.from_pretrained(hf_directory.resolve("embedded:tiny-arithmetic"))
    model_type, sizes = SHAPES[shape]
    common: dict[str, Any] = {
        "vocab_size": 151_936,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32_768,
        **{name: getattr(ids, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    return AutoConfig.for_model(model_type, **{**common, **sizes, **others})


def make(shape: str, device: str = "cpu", **others: int) -> PreTrainedModel:
    """A model in bf16, always with the same weights on the same kind of device."""
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(shape, **others), dtype=torch.bfloat16)
        return model


def save(shape: str, directory: Path, device: str = "cpu", *, words: bool = False, **others: int) -> Path:
    """Write model and tokenizer into ``directory``; returns it.

    Args:
        words: with `word_tokenizer`.
        others: sizes that replace those of the shape.
    """
    model = make(shape, device, **others)
    model.save_pretrained(directory)
    if words:
        word_tokenizer(model.config.vocab_size).save_pretrained(directory)
        return directory
    for file in hf_directory.resolve("embedded:tiny-arithmetic").iterdir():
        if file.name.startswith(("tokenizer", "special", "chat")):
            shutil.copy(file, directory)
    return directory


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token per word ``w5``, with the embedded tokenizer's first tokens: every token id has a text."""
    names = ("<pad>", "<bos>", "<eos>", "<unk>")
    ids = {name: index for index, name in enumerate((*names, *(f"w{i}" for i in range(len(names), vocab_size))))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=names[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins words with blanks
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
    )
    given = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), names, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **given)
