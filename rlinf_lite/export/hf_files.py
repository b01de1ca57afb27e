"""A Hugging Face directory of a causal LM: what is written beside the weights, and which file holds which of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlinf_lite.checkpoint import StateMismatch
from rlinf_lite.checkpoint.storage import sync_dir
from rlinf_lite.export.durable_output import durable_file
from rlinf_lite.export.safetensors_file import Spec, dtype_of
from rlinf_lite.models.weights import INDEX, open_file, tensor_files

CONFIG = "config.json"
KEY = "--hf_path "
_SIDE_FILES = {".json", ".jinja", ".model", ".py", ".tiktoken", ".txt"}
_SIDE_FOLDERS = ("additional_chat_templates",)
# An adapter's config would make `from_pretrained` look for the adapter.
_NOT_COPIED = {CONFIG, "adapter_config.json"}


def file_names(num_files: int) -> list[str]:
    """What the weight files of a directory are called."""
    if num_files == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{num_files:05d}.safetensors" for number in range(1, num_files + 1)]


def write_index(directory: Path, parts: Mapping[str, Mapping[str, Spec]]) -> None:
    """Which tensor is in which file.

    Args:
        parts: what each file holds, by its name.
    """
    total = sum(spec.num_bytes for part in parts.values() for spec in part.values())
    where = {name: file for file, part in parts.items() for name in part}
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def write_config(directory: Path, base: Path, dtype: torch.dtype, architecture: str) -> None:
    """The base model's ``config.json``, but of the type of the weights that were written."""
    config = json.loads((base / CONFIG).read_text())
    name = str(dtype).removeprefix("torch.")
    config["dtype"] = name
    if "torch_dtype" in config:  # what it was called before, and what older readers look for
        config["torch_dtype"] = name
    config.pop("quantization_config", None)  # of the base's weights: the ones written are plain
    config["architectures"] = config.get("architectures") or [architecture]
    _write_json(directory / CONFIG, config)


def copy_side_files(directory: Path, base: Path) -> None:
    """Generation config, tokenizer and chat template: all small files of the base model that are no weights."""
    for file in sorted(base.iterdir()):
        if file.is_file() and _is_side_file(file.name):
            _copy(file, directory / file.name)
        elif file.is_dir() and file.name in _SIDE_FOLDERS:
            (directory / file.name).mkdir()
            for template in sorted(file.glob("*.jinja")):
                _copy(template, directory / file.name / template.name)
            sync_dir(directory / file.name)


def _is_side_file(name: str) -> bool:
    hidden_or_index = name.startswith(".") or name.endswith(".index.json")
    return Path(name).suffix in _SIDE_FILES and name not in _NOT_COPIED and not hidden_or_index


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as original, durable_file(target) as copy:
        shutil.copyfileobj(original, copy)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    with durable_file(file) as stream:
        stream.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


class HfModel:
    """The weights in a Hugging Face directory, by their names in the model, read one at a time."""

    def __init__(self, directory: Path, names: Sequence[str], aliases: Mapping[str, str], prefix: str) -> None:
        """
        Args:
            names: of all tensors of the model.
            aliases: further names for some of them (alias -> name); a directory may keep a tensor under either.
            prefix: what a file saved from the bare base model leaves out of the names (``transformer.`` of GPT-2).

        Raises:
            ConfigError, StateMismatch: the directory holds no safetensors, or not all tensors.
        """
        self.directory = directory
        self._files = tensor_files(directory, KEY)
        known = {name: [name, *(alias for alias, first in aliases.items() if first == name)] for name in names}
        self._stored: dict[str, list[str]] = {
            name: [stored for own in every for stored in (own, own.removeprefix(prefix)) if stored in self._files]
            for name, every in known.items()
        }
        if missing := [name for name, stored in self._stored.items() if not stored]:
            raise StateMismatch(f"{KEY}{directory}: its weights lack {', '.join(missing)}")
        used = {stored for every in self._stored.values() for stored in every}
        self.unused = sorted(self._files.keys() - used)
        """What the files hold and the model does not have."""
        self._check_ties()

    def _check_ties(self) -> None:
        for name, stored in self._stored.items():
            first, *others = dict.fromkeys(stored)
            for other in others:
                if not torch.equal(self._read(first), self._read(other)):
                    raise StateMismatch(
                        f"{KEY}{self.directory}: {other} differs from {first}, but is the same tensor of the model "
                        f"({name}); if it should not be, config.json must say tie_word_embeddings: false"
                    )

    def spec(self, name: str) -> Spec:
        """Type and shape as stored."""
        stored = self._stored[name][0]
        with open_file(self._files[stored], KEY) as opened:
            found = opened.get_slice(stored)
            try:
                return Spec(dtype=dtype_of(found.get_dtype()), shape=tuple(found.get_shape()))
            except ValueError as error:
                raise StateMismatch(f"{KEY}{self.directory}: {stored}: {error}") from None

    def read(self, name: str) -> torch.Tensor:
        """One tensor as stored."""
        return self._read(self._stored[name][0])

    def _read(self, stored: str) -> torch.Tensor:
        # Opened anew each time: what an open file has read stays mapped, until all of it is.
        with open_file(self._files[stored], KEY) as opened:
            return opened.get_tensor(stored)
