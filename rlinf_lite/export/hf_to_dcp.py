"""Convert a Hugging Face directory to a checkpoint of step 0, with one tensor in memory at a time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PretrainedConfig

from rlinf_lite.checkpoint import Checkpointer, SaveReport, layout
from rlinf_lite.checkpoint.storage import StoragePath
from rlinf_lite.errors import ConfigError
from rlinf_lite.export.arguments import checkpoint_path, dtype_of, run, wrote
from rlinf_lite.models.build import DTYPES, build_on_meta
from rlinf_lite.models.hf_directory import EMBEDDED, load_config, resolve
from rlinf_lite.weights.hf import HfWeights
from rlinf_lite.weights.names import WeightNames, listed

STEP = 0
MODEL = "model"
"""The top-level key of the weights in a trainer's state."""

DESCRIPTION = """\
Write the weights of a Hugging Face directory as a checkpoint (global_step_0) that holds a model and nothing else:
a run starts from it with runner.resume_dir=.../global_step_0 runner.resume_mode=weights. The model is a policy; a
critic needs no conversion, a run takes its Hugging Face directory as critic.model.model_path.

example:
  python toolkits/ckpt_convertor/convert_hf_to_dcp.py --hf_path Qwen2.5-1.5B --output_path logs/base/checkpoints
writes logs/base/checkpoints/global_step_0."""


def checkpoints_root(output_path: StoragePath) -> StoragePath:
    """The directory of checkpoints that ``output_path`` means.

    Raises:
        ConfigError: it is the name of another step.
        FileExistsError: there is a global_step_0 already.
    """
    step = layout.step_of(output_path)
    if step not in (None, STEP):
        raise ConfigError(f"--output_path {output_path}: weights without a run are global_step_{STEP}; write that")
    root = output_path if step is None else output_path.parent
    if layout.step_dir(root, STEP).exists():
        raise FileExistsError(f"--output_path {layout.step_dir(root, STEP)}: exists already; give another path")
    return root


def convert(
    directory: Path, root: StoragePath, *, dtype: torch.dtype | None = None, model_path: str
) -> tuple[SaveReport, list[str]]:
    """Commit ``global_step_0`` in ``root``.

    Returns:
        The save's report, and the names of tensors in ``directory`` that the model does not have.

    Raises:
        UserError, OSError: nothing was committed.
    """
    config = load_config(directory, None)
    check_policy(config, directory)
    names = WeightNames.of(build_on_meta(config, "fp32"))
    source = HfWeights(directory, names, where=f"--hf_path {directory}")
    source.check_ties()
    tensors = {name: _meta(source, name, dtype) for name in names.shapes}

    def resolve_one(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:  # this process's RNG state, which every checkpoint holds
            return tensor
        return source.read(name.removeprefix(f"{MODEL}.")).to(tensor.dtype)

    report = Checkpointer(root).save(
        STEP, {MODEL: tensors}, info={"tied": names.tied, "model_path": model_path}, resolve=resolve_one
    )
    return report, source.unused


def check_policy(config: PretrainedConfig, directory: Path) -> None:
    """Refuse a critic: with tied embeddings its weights suffice for a causal LM, which nobody has trained."""
    if classifiers := [name for name in config.architectures or () if name.endswith("Classification")]:
        raise ConfigError(
            f"holds a {classifiers[0]}, and only a causal LM becomes a checkpoint of weights",
            key="--hf_path",
            value=directory,
            remedy="a critic needs no conversion: a run takes this directory as critic.model.model_path",
        )


def _meta(source: HfWeights, name: str, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor without memory, of the shape and type to save."""
    stored = source.dtype(name)
    target = dtype if dtype is not None and stored.is_floating_point else stored
    return torch.empty(source.shapes[name], dtype=target, device="meta")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hf_path", required=True, metavar="HF_DIR", help="a Hugging Face directory with config.json and *.safetensors"
    )
    parser.add_argument(
        "--output_path",
        type=checkpoint_path,
        required=True,
        help=f"a directory of checkpoints, or the global_step_{STEP} to make in one",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="type of the weights: the run's actor.model.precision; default: as in the files"
    )
    return parser.parse_args(arguments)


def _command(options: argparse.Namespace) -> str:
    root = checkpoints_root(options.output_path)
    directory = resolve(options.hf_path, "--hf_path")
    model_path = options.hf_path if options.hf_path.startswith(EMBEDDED) else str(directory)
    dtype = dtype_of(options)
    report, unused = convert(directory, root, dtype=dtype, model_path=model_path)
    note = f"note: not in the model, so not written: {listed(unused)}\n" if unused else ""
    return note + wrote(report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says. Returns the exit code: 0, or 2 after one line on stderr."""
    return run(_command, parse(arguments))
