"""The files of a Hugging Face directory beside the weights: config, index, tokenizer and chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlinf_lite.durable import new_file, sync_directory
from rlinf_lite.export.safetensors_file import Spec
from rlinf_lite.weights.hf import INDEX

CONFIG = "config.json"
_SIDE_FILES = {".json", ".jinja", ".model", ".py", ".tiktoken", ".txt"}
_SIDE_DIRECTORIES = ("additional_chat_templates",)
# An adapter's config would make `from_pretrained` look for the adapter.
_NOT_COPIED = {CONFIG, "adapter_config.json"}


def file_names(num_files: int) -> list[str]:
    """Names of a directory's weight files."""
    if num_files == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{num_files:05d}.safetensors" for number in range(1, num_files + 1)]


def write_index(directory: Path, parts: Mapping[str, Mapping[str, Spec]]) -> None:
    """Write the index: which tensor is in which file.

    Args:
        parts: what each file holds, by its name.
    """
    total = sum(spec.num_bytes for part in parts.values() for spec in part.values())
    where = {name: file for file, part in parts.items() for name in part}
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def write_config(
    directory: Path, base: Path, dtype: torch.dtype, architecture: str, *, one_label: bool = False
) -> None:
    """Write the base model's ``config.json`` with the type of the weights that were written.

    Args:
        architecture: name of the class, where the base names none.
        one_label: it is a token classifier with one label, whatever the base is.
    """
    config = json.loads((base / CONFIG).read_text())
    name = str(dtype).removeprefix("torch.")
    config["dtype"] = name
    if "torch_dtype" in config:  # its former name, which older readers look for
        config["torch_dtype"] = name
    config.pop("quantization_config", None)  # the base's weights may be quantized, the written ones are not
    config["architectures"] = config.get("architectures") or [architecture]
    if one_label:
        config |= {"architectures": [architecture], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    _write_json(directory / CONFIG, config)


def copy_side_files(directory: Path, base: Path) -> None:
    """Copy generation config, tokenizer and chat template: all small files of the base model except the weights."""
    for file in sorted(base.iterdir()):
        if file.is_file() and _is_side_file(file.name):
            _copy(file, directory / file.name)
        elif file.is_dir() and file.name in _SIDE_DIRECTORIES:
            (directory / file.name).mkdir()
            for template in sorted(file.glob("*.jinja")):
                _copy(template, directory / file.name / template.name)
            sync_directory(directory / file.name)


def _is_side_file(name: str) -> bool:
    hidden_or_index = name.startswith(".") or name.endswith(".index.json")
    return Path(name).suffix in _SIDE_FILES and name not in _NOT_COPIED and not hidden_or_index


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as original, new_file(target) as copy:
        shutil.copyfileobj(original, copy)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    with new_file(file) as stream:
        stream.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
