"""Convert a checkpoint to a Hugging Face directory, with one tensor in memory at a time."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rlinf_lite import readable
from rlinf_lite.checkpoint.manifest import LEVELS
from rlinf_lite.durable import new_directory, new_file
from rlinf_lite.errors import EXIT_USER_ERROR, ConfigError, UserError
from rlinf_lite.export.arguments import checkpoint_path, size
from rlinf_lite.export.checkpoint_path import CRITIC, DCP_PATH_HELP, Located, located
from rlinf_lite.export.hf_files import copy_side_files, file_names, write_config, write_index
from rlinf_lite.export.safetensors_file import Spec, split, write
from rlinf_lite.models.build import DTYPES, build_on_meta, build_value_model_on_meta
from rlinf_lite.models.hf_directory import TOKENIZER_FILES, load_config, resolve, tokenizer_fingerprint
from rlinf_lite.paths import argument
from rlinf_lite.weights.dcp import DcpWeights
from rlinf_lite.weights.names import WeightNames
from rlinf_lite.weights.source import WeightSource

DESCRIPTION = """\
Write the model of a checkpoint as a Hugging Face directory: weights in safetensors files; config, generation config,
tokenizer and chat template of the base model. AutoModelForCausalLM.from_pretrained and vLLM load it. A critic
(--dcp_path global_step_N/critic) becomes a token classifier with one label, its value, which
AutoModelForTokenClassification loads, and a run as its critic.model.model_path.

example:
  python toolkits/ckpt_convertor/convert_dcp_to_hf.py \\
      --dcp_path logs/grpo-1.5b/checkpoints/global_step_50 \\
      --output_path exported --dtype bf16"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a conversion wrote."""

    num_tensors: int
    num_files: int
    num_bytes: int
    dtype: torch.dtype
    """As in ``config.json``."""


def base_model(given: str | None, source: Located) -> Path:
    """The directory of the model that was trained: the one given, else the one that the checkpoint names.

    Raises:
        ConfigError: neither exists; names --base_model.
    """
    if given is not None:
        return resolve(given, "--base_model")
    info = source.manifest.info if source.manifest else {}
    section, name = (CRITIC, "critic_model_path") if source.is_critic else ("actor", "model_path")
    named = info.get(name)
    if named is None:
        raise ConfigError(
            "--base_model is needed: the checkpoint does not name the model it started from; give the "
            f"Hugging Face directory that the run had as {section}.model.model_path"
        )
    try:
        return resolve(named, f"{name} in the checkpoint's manifest")
    except ConfigError as error:
        raise ConfigError(f"{error}; or give the directory with --base_model") from None


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


def convert(
    source: Located, target: Path, *, base: Path, dtype: torch.dtype | None = None, max_shard_size: int
) -> Written:
    """Write the Hugging Face directory ``target``, which must not exist or be empty.

    Raises:
        UserError, OSError: it cannot be written whole; then nothing is written.
    """
    model = _trained_model(source, base)
    weights = DcpWeights(source.directory, WeightNames.of(model), tied=source.tied, base="--base_model")
    specs = specs_of(weights, dtype)
    parts = split(specs, max_shard_size)
    files = dict(zip(file_names(len(parts)), parts, strict=True))
    refuse_existing(target)
    with new_directory(target) as directory:
        copy_side_files(directory, base)
        for file, part in files.items():
            with new_file(directory / file) as stream:
                write(stream, part, lambda name: read_as(weights, name, specs[name].dtype))
        if len(files) > 1:
            write_index(directory, files)
        write_config(directory, base, common_dtype(specs), type(model).__name__, one_label=source.is_critic)
    num_bytes = sum(spec.num_bytes for spec in specs.values())
    return Written(num_tensors=len(specs), num_files=len(files), num_bytes=num_bytes, dtype=common_dtype(specs))


def _trained_model(source: Located, base: Path) -> PreTrainedModel:
    """The architecture of the model in ``source``: that of ``base`` as a causal LM, or as a critic."""
    config = load_config(base, None)
    if not source.is_critic:
        return build_on_meta(config, "fp32")
    try:
        return build_value_model_on_meta(config, "fp32")
    except ConfigError:
        raise ConfigError(
            f"--dcp_path {source.directory}: a critic is exported as a token classifier, and transformers has none for "
            f"the model type {config.model_type} of {base}; give the model that the critic started from with "
            "--base_model, or use convert_dcp_to_state_dict.py"
        ) from None


def notes(source: Located, base: Path) -> list[str]:
    """What the user should know about the directory that was written."""
    identity = source.manifest.info.get("identity", {}) if source.manifest else {}
    trained_with = identity.get(TOKENIZER_FILES)
    if trained_with is None or trained_with == tokenizer_fingerprint(base):
        return []
    return [
        f"note: the tokenizer files are those of {base}; the run had others: copy them from its "
        "actor.tokenizer.tokenizer_model"
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dcp_path", type=checkpoint_path, required=True, help=DCP_PATH_HELP)
    parser.add_argument(
        "--output_path",
        type=argument,
        required=True,
        metavar="OUT_DIR",
        help="the directory to make; it must not exist yet",
    )
    parser.add_argument(
        "--base_model",
        metavar="HF_DIR",
        help="the model that the run started from; default: the one that the checkpoint names",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights to write; default: as in the checkpoint")
    parser.add_argument(
        "--max_shard_size", type=size, default="2GB", metavar="SIZE", help="of a weights file; default: 2GB"
    )
    parser.add_argument(
        "--verify", choices=LEVELS, default="full", help="how to check the checkpoint's files first; default: full"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says. Returns the exit code: 0, or 2 after one line on stderr."""
    options = parse(arguments)
    target = options.output_path.resolve()
    try:
        refuse_existing(target)  # before the minutes that verifying takes
        with located(options.dcp_path, options.verify) as source:
            base = base_model(options.base_model, source)
            dtype = DTYPES[options.dtype] if options.dtype else None
            written = convert(source, target, base=base, dtype=dtype, max_shard_size=options.max_shard_size)
            lines = notes(source, base)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    size_text = f"{written.num_tensors} tensors, {readable.size(written.num_bytes)} as {written.dtype}"
    print("\n".join([*lines, f"wrote {size_text} in {written.num_files} file(s): {target}"]))
    return 0
