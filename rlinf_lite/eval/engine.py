"""Builds a rollout engine in this process, with the weights of a checkpoint or of a Hugging Face directory."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from rlinf_lite import numerics
from rlinf_lite.checkpoint import layout
from rlinf_lite.checkpoint.formats.training_file import file_reader
from rlinf_lite.checkpoint.sections import files_of
from rlinf_lite.config import ConfigError, EvalConfig
from rlinf_lite.eval.source import Source
from rlinf_lite.models import build, hf_directory, vocabulary
from rlinf_lite.rollout.build import build_engine as build_empty
from rlinf_lite.rollout.engine import RolloutEngine
from rlinf_lite.weights.dcp import DcpWeights
from rlinf_lite.weights.hf import HfWeights
from rlinf_lite.weights.megatron.architecture import Architecture
from rlinf_lite.weights.megatron.files import MegatronFiles
from rlinf_lite.weights.megatron.source import MegatronWeights
from rlinf_lite.weights.names import WeightNames
from rlinf_lite.weights.source import WeightSource, whole_pieces


def prepare_device(config: EvalConfig) -> torch.device:
    """Fix threads and kernels as a rollout worker does; returns the device.

    Raises:
        ConfigError: ``cluster.device=cuda`` and there is no GPU.
    """
    settings = config.cluster
    wanted, found = settings.device, torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise ConfigError("cluster.device=cuda: no CUDA device here; give --device cpu")
    device = "cpu" if wanted == "cpu" or not found else "cuda"
    return numerics.fix(device, threads=settings.threads_per_worker, deterministic=settings.deterministic)


def build_engine(config: EvalConfig, source: Source, device: torch.device) -> RolloutEngine:
    """The engine that ``rollout.rollout_backend`` names, with the weights of ``source``.

    Raises:
        ConfigError, CheckpointError: the model cannot be built, or the weights belong to another model.
    """
    settings = config.rollout.model
    model_dir = hf_directory.resolve(settings.model_path, "rollout.model.model_path")
    model = build.build_on_meta(hf_directory.load_config(model_dir, settings.model_type), settings.precision)
    tokenizer_dir = hf_directory.resolve(config.actor.tokenizer.tokenizer_model, "actor.tokenizer.tokenizer_model")
    tokenizer = hf_directory.load_tokenizer(tokenizer_dir)
    stored = stored_weights(model, source)
    engine = build_empty(
        config.rollout,
        model,
        tokenizer,
        seq_length=config.seq_length,
        sampling=config.algorithm.val_sampling_params,
        model_dir=model_dir,
        shapes=dict(stored.shapes),
        eos_ids=vocabulary.eos_ids(model_dir, tokenizer),
        device=device,
        materialize=build.materialize,
    )
    engine.load_weights(whole_pieces(stored, build.DTYPES[settings.precision]))
    return engine


def stored_weights(model: PreTrainedModel, source: Source) -> WeightSource:
    """Every weight of ``model``, from a checkpoint or a Hugging Face directory.

    Raises:
        ConfigError, StateMismatch: ``source`` holds the weights of another model.
    """
    names = WeightNames.of(model)
    if source.manifest is None:
        return HfWeights(hf_directory.resolve(str(source.directory), "MODEL"), names)
    if not source.manifest.has_shards():
        held = list(files_of(layout.ACTOR, source.manifest))
        files = MegatronFiles(held, file_reader(source.section_dir), Architecture.of(model.config))
        return MegatronWeights(files, names)
    tied = source.manifest.info.get("tied", {})
    return DcpWeights(source.section_dir, names, tied=tied, base="actor.model.model_path")
