"""Writes the weights of any source as a Hugging Face directory, with one tensor in memory at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch

from rlinf_lite import readable
from rlinf_lite.checkpoint import Manifest
from rlinf_lite.durable import new_directory, new_file
from rlinf_lite.errors import ConfigError, UserError
from rlinf_lite.export.hf_files import copy_side_files, file_names, write_config, write_index
from rlinf_lite.export.safetensors_file import Spec, split, write
from rlinf_lite.models.hf_directory import TOKENIZER_FILES, resolve, tokenizer_fingerprint
from rlinf_lite.weights.source import WeightSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a conversion wrote."""

    num_tensors: int
    num_files: int
    num_bytes: int
    dtype: torch.dtype
    """As in ``config.json``."""

    def __str__(self) -> str:
        return (
            f"{self.num_tensors} tensors, {readable.size(self.num_bytes)} as {self.dtype} in {self.num_files} file(s)"
        )


def named_base(given: str | None, named: object, key: str, name: str) -> Path:
    """The directory of the model that was trained: the one given, else the one that the checkpoint names.

    Args:
        named: the checkpoint's; None if it names none.
        key: of the config in which the run had it.
        name: of the entry in the checkpoint's manifest.

    Raises:
        ConfigError: neither exists; names --base_model.
    """
    if given is not None:
        return resolve(given, "--base_model")
    if named is None:
        raise ConfigError(
            "--base_model is needed: the checkpoint does not name the model it started from; give the "
            f"Hugging Face directory that the run had as {key}"
        )
    try:
        return resolve(str(named), f"{name} in the checkpoint's manifest")
    except ConfigError as error:
        raise ConfigError(f"{error}; or give the directory with --base_model") from None


def tokenizer_note(manifest: Manifest | None, base: Path) -> str:
    """A line for the user if the run had another tokenizer than ``base``, whose files are copied; else empty."""
    identity = manifest.info.get("identity", {}) if manifest else {}
    trained_with = identity.get(TOKENIZER_FILES)
    if trained_with is None or trained_with == tokenizer_fingerprint(base):
        return ""
    return (
        f"note: the tokenizer files are those of {base}; the run had others: copy them from its "
        "actor.tokenizer.tokenizer_model\n"
    )


def specs_of(source: WeightSource, dtype: torch.dtype | None) -> dict[str, Spec]:
    """Type and shape of each tensor to write: floating-point ones as ``dtype``, or as stored if it is None."""

    def target(stored: torch.dtype) -> torch.dtype:
        return dtype if dtype is not None and stored.is_floating_point else stored

    return {name: Spec(dtype=target(source.dtype(name)), shape=shape) for name, shape in source.shapes.items()}


def common_dtype(specs: Mapping[str, Spec]) -> torch.dtype:
    """The type that holds all floating-point tensors without loss."""
    floating = Counter(spec.dtype for spec in specs.values() if spec.dtype.is_floating_point)
    return reduce(torch.promote_types, floating, next(iter(floating), torch.float32))


def read_as(source: WeightSource, name: str, dtype: torch.dtype) -> torch.Tensor:
    """One tensor of the checkpoint as ``dtype``.

    Raises:
        UserError: a finite value would become infinite.
    """
    tensor = source.read(name)
    converted = tensor.to(dtype)
    if converted is not tensor and not torch.equal(torch.isfinite(tensor), torch.isfinite(converted)):
        raise UserError(f"{name} has values that are too large for {dtype}", remedy="choose another --dtype")
    return converted


def refuse_existing(path: Path) -> None:
    """Raise FileExistsError unless ``path`` is free, or an empty directory."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        what = "is there already and not empty" if path.is_dir() else "is there already"
        raise FileExistsError(f"--output_path {path}: {what}; give another path, or remove it first")


def write_model(
    source: WeightSource,
    target: Path,
    *,
    base: Path,
    dtype: torch.dtype | None,
    max_shard_size: int,
    architecture: str,
    one_label: bool = False,
) -> Written:
    """Write the Hugging Face directory ``target``, which must not exist or be empty.

    Args:
        architecture, one_label: as for `write_config`.

    Raises:
        UserError, OSError: it cannot be written whole; then nothing is written.
    """
    specs = specs_of(source, dtype)
    parts = split(specs, max_shard_size)
    files = dict(zip(file_names(len(parts)), parts, strict=True))
    refuse_existing(target)
    with new_directory(target) as directory:
        copy_side_files(directory, base)
        for file, part in files.items():
            with new_file(directory / file) as stream:
                write(stream, part, lambda name: read_as(source, name, specs[name].dtype))
        if len(files) > 1:
            write_index(directory, files)
        write_config(directory, base, common_dtype(specs), architecture, one_label=one_label)
    num_bytes = sum(spec.num_bytes for spec in specs.values())
    return Written(num_tensors=len(specs), num_files=len(files), num_bytes=num_bytes, dtype=common_dtype(specs))
