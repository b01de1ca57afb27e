"""One rollout engine in this process, with the weights of a checkpoint or of a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedModel

from rlinf_lite import numerics
from rlinf_lite.checkpoint import StateMismatch
from rlinf_lite.checkpoint.formats.dcp_reader import ShardReader, check_size
from rlinf_lite.checkpoint.storage import StoragePath
from rlinf_lite.config import Config, ConfigError
from rlinf_lite.eval.source import Source
from rlinf_lite.models import build, hf_directory, vocabulary, weights
from rlinf_lite.rollout.build import build_engine as build_empty
from rlinf_lite.rollout.engine import RolloutEngine

_MODEL = "model."
"""What the names of the model's tensors in a checkpoint begin with."""


def prepare_device(config: Config) -> torch.device:
    """Fix threads and kernels as a rollout worker does; returns the device.

    Raises:
        ConfigError: a GPU is asked for, and there is none.
    """
    settings = config.cluster
    wanted, found = settings.device, torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise ConfigError("cluster.device=cuda: no CUDA device here; give --device cpu")
    device = "cpu" if wanted == "cpu" or not found else "cuda"
    return numerics.fix(device, threads=settings.threads_per_worker, deterministic=settings.deterministic)


def build_engine(config: Config, source: Source, device: torch.device) -> RolloutEngine:
    """The engine that ``rollout.rollout_backend`` names, its weights those of ``source``.

    Raises:
        ConfigError, CheckpointError: the model cannot be built, or the weights are of another one.
    """
    settings = config.rollout.model
    model_dir = hf_directory.resolve(settings.model_path, "rollout.model.model_path")
    model = build.build_on_meta(hf_directory.load_config(model_dir, settings.model_type), settings.precision)
    tokenizer_dir = hf_directory.resolve(config.actor.tokenizer.tokenizer_model, "actor.tokenizer.tokenizer_model")
    tokenizer = hf_directory.load_tokenizer(tokenizer_dir)
    stored, dtype = stored_weights(model, source), build.DTYPES[settings.precision]
    engine = build_empty(
        config,
        model,
        tokenizer,
        model_dir=model_dir,
        shapes=build.weight_shapes(model),
        eos_ids=vocabulary.eos_ids(model_dir, tokenizer),
        device=device,
        materialize=build.materialize,
    )
    engine.load_weights(
        (name, 0, tensor.to(dtype) if tensor.is_floating_point() else tensor) for name, tensor in stored
    )
    return engine


def stored_weights(model: PreTrainedModel, source: Source) -> Iterator[tuple[str, Tensor]]:
    """Every weight of ``model`` whole, as stored, one in memory at a time.

    Raises:
        ConfigError, StateMismatch: ``source`` holds another model.
    """
    if source.manifest is None:
        return weights.read(model, hf_directory.resolve(str(source.directory), "MODEL"))
    return _from_shards(source.actor_dir, build.weight_shapes(model))


def _from_shards(actor_dir: StoragePath, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    reader = ShardReader(actor_dir)
    held = {
        name.removeprefix(_MODEL): entry
        for name, entry in reader.metadata.state_dict_metadata.items()
        if name.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata)
    }
    check_size(actor_dir, held)
    for name, shape in shapes.items():
        found = tuple(held[name].size) if name in held else None
        if found != shape:
            what = "is not there" if found is None else f"is {list(found)}, the base model's is {list(shape)}"
            raise StateMismatch(
                f"{actor_dir}: {name} {what}; give the base model of the run, actor.model.model_path=HF_DIR"
            )
    return _read(reader, held, shapes)


def _read(
    reader: ShardReader, held: dict[str, TensorStorageMetadata], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=held[name].properties.dtype)
        reader.read({f"{_MODEL}{name}": tensor})
        yield name, tensor
