"""Convert a checkpoint to a Hugging Face directory, with one tensor in memory at a time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rlinf_lite.checkpoint.manifest import LEVELS
from rlinf_lite.errors import ConfigError
from rlinf_lite.export.arguments import add_base_model, checkpoint_path, dtype_of, run, size
from rlinf_lite.export.checkpoint_path import CRITIC, DCP_PATH_HELP, Located, located
from rlinf_lite.export.hf_writer import Written, named_base, refuse_existing, tokenizer_note, write_model
from rlinf_lite.models.build import DTYPES, build_on_meta, build_value_model_on_meta
from rlinf_lite.models.hf_directory import load_config
from rlinf_lite.paths import argument
from rlinf_lite.weights.dcp import DcpWeights
from rlinf_lite.weights.names import WeightNames

DESCRIPTION = """\
Write the model of a checkpoint as a Hugging Face directory: weights in safetensors files; config, generation config,
tokenizer and chat template of the base model. AutoModelForCausalLM.from_pretrained and vLLM load it. A critic
(--dcp_path global_step_N/critic) becomes a token classifier with one label, its value, which
AutoModelForTokenClassification loads, and a run as its critic.model.model_path.

example:
  python toolkits/ckpt_convertor/convert_dcp_to_hf.py \\
      --dcp_path logs/grpo-1.5b/checkpoints/global_step_50 \\
      --output_path exported --dtype bf16"""


def base_model(given: str | None, source: Located) -> Path:
    """The directory of the model that was trained: the one given, else the one that the checkpoint names.

    Raises:
        ConfigError: neither exists; names --base_model.
    """
    info = source.manifest.info if source.manifest else {}
    section, name = (CRITIC, "critic_model_path") if source.is_critic else ("actor", "model_path")
    return named_base(given, info.get(name), f"{section}.model.model_path", name)


def convert(
    source: Located, target: Path, *, base: Path, dtype: torch.dtype | None = None, max_shard_size: int
) -> Written:
    """Write the Hugging Face directory ``target``, which must not exist or be empty.

    Raises:
        UserError, OSError: it cannot be written whole; then nothing is written.
    """
    model = _trained_model(source, base)
    weights = DcpWeights(source.directory, WeightNames.of(model), tied=source.tied, base="--base_model")
    return write_model(
        weights,
        target,
        base=base,
        dtype=dtype,
        max_shard_size=max_shard_size,
        architecture=type(model).__name__,
        one_label=source.is_critic,
    )


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
    add_base_model(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights to write; default: as in the checkpoint")
    parser.add_argument(
        "--max_shard_size", type=size, default="2GB", metavar="SIZE", help="of a weights file; default: 2GB"
    )
    parser.add_argument(
        "--verify", choices=LEVELS, default="full", help="how to check the checkpoint's files first; default: full"
    )
    return parser.parse_args(arguments)


def _command(options: argparse.Namespace) -> str:
    target = options.output_path.resolve()
    refuse_existing(target)  # before the minutes that verifying takes
    with located(options.dcp_path, options.verify) as source:
        base = base_model(options.base_model, source)
        dtype = dtype_of(options)
        written = convert(source, target, base=base, dtype=dtype, max_shard_size=options.max_shard_size)
    return tokenizer_note(source.manifest, base) + f"wrote {written}: {target}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says. Returns the exit code: 0, or 2 after one line on stderr."""
    return run(_command, parse(arguments))
