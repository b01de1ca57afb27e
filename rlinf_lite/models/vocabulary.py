"""Check tokenizer against model: end-of-sequence ids, padding, and ids without an embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlinf_lite.errors import ConfigError
from rlinf_lite.models.files import read_object

_MODEL_KEY = "actor.model.model_path"
_TOKENIZER_KEY = "actor.tokenizer.tokenizer_model"


def eos_ids(directory: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Token ids that end a response: those of ``generation_config.json``, else of ``config.json``, and the tokenizer's.

    Raises:
        ConfigError: there is none, or a listed id is not a token id of the model.
    """
    found = _listed(directory)
    if isinstance(tokenizer.eos_token_id, int):
        found |= {tokenizer.eos_token_id}
    if not found:
        raise ConfigError(
            f"{_TOKENIZER_KEY}={directory}: neither the tokenizer, nor generation_config.json, nor config.json has an "
            "eos token; set eos_token_id in generation_config.json"
        )
    size = _stated_size(directory)
    if size is not None and min(found) >= size:
        raise ConfigError(
            f"{_TOKENIZER_KEY}={directory}: the eos token is {min(found)}, but the model has only the tokens 0 to "
            f"{size - 1}, so no response could end; use the model's own tokenizer, or set eos_token_id in "
            "generation_config.json"
        )
    return frozenset(found)


def _listed(directory: Path) -> set[int]:
    for file in (directory / "generation_config.json", directory / "config.json"):
        if not file.is_file():
            continue
        config = read_object(file, _MODEL_KEY)
        value = config.get("eos_token_id")
        if value is None and isinstance(config.get("text_config"), dict):
            value = config["text_config"].get("eos_token_id")
        ids = {_checked(item, file) for item in (value if isinstance(value, list) else [value]) if item is not None}
        if ids:
            return ids
    return set()


def _checked(value: Any, file: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        problem = f"eos_token_id has {value!r}, which is not a token id"
        raise ConfigError(f"{_MODEL_KEY}={file.parent}: {file.name}: {problem}; write an integer, or a list of them")
    return value


def _stated_size(directory: Path) -> int | None:
    """``vocab_size`` of ``config.json``; None if it has none."""
    if not (directory / "config.json").is_file():
        return None
    config = read_object(directory / "config.json", _MODEL_KEY)
    nested = config.get("text_config")
    size = config.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    return size if isinstance(size, int) else None


def num_embeddings(config: PretrainedConfig) -> int:
    """Number of tokens with an embedding; often more than the tokenizer has."""
    size = config.get_text_config().vocab_size
    assert isinstance(size, int), size
    return size


def check_prompts(max_token_id: int, tokenizer_dir: Path, models: dict[Path, PretrainedConfig]) -> None:
    """Check that the models have an embedding for every token of the prompts.

    Args:
        max_token_id: the largest id in any prompt.
        models: the configs of the models that will read the prompts, by their directories.

    Raises:
        ConfigError: a model has no embedding for it.
    """
    for model_dir, config in models.items():
        size = num_embeddings(config)
        if max_token_id >= size:
            raise ConfigError(
                f"{_TOKENIZER_KEY}={tokenizer_dir}: prompts have the token {max_token_id}, but the model in "
                f"{model_dir} has only {size} (0 to {size - 1}: vocab_size in its config.json); use the "
                "tokenizer that belongs to the model"
            )


def more_tokens_than_model(
    tokenizer: PreTrainedTokenizerBase, tokenizer_dir: Path, config: PretrainedConfig, model_dir: Path
) -> str | None:
    """A warning about a tokenizer with ids beyond the model's that no prompt uses; None if it has none."""
    beyond = max(tokenizer.get_vocab().values(), default=-1) + 1
    size = num_embeddings(config)
    if beyond <= size:
        return None
    return (
        f"!! the tokenizer in {tokenizer_dir} has ids up to {beyond - 1}, the model in {model_dir} only up to "
        f"{size - 1}; no prompt uses the others"
    )
