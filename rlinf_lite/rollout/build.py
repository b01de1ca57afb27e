"""Build the engine that ``rollout.rollout_backend`` names. Only this module imports vLLM, and only if needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlinf_lite.config import RolloutConfig, SamplingConfig
from rlinf_lite.rollout.builtin import BuiltinEngine
from rlinf_lite.rollout.engine import RolloutEngine


def build_engine(
    config: RolloutConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_length: int,
    sampling: SamplingConfig,
    model_dir: Path,
    shapes: dict[str, tuple[int, ...]],
    eos_ids: frozenset[int],
    device: torch.device,
    materialize: Callable[[PreTrainedModel, torch.device], None],
) -> RolloutEngine:
    """Build an engine without weights.

    Args:
        model: on the meta device; used by the builtin engine, vLLM builds its own.
        seq_length: largest number of tokens in a prompt and its response together.
        sampling: of training, for the log-probs that vLLM reports.
        model_dir: the Hugging Face directory it was built from.
        shapes: name and global shape of every weight that `load_weights` will bring.
        materialize: allocates ``model`` on a device.

    Raises:
        ConfigError: the engine is not installed, or cannot run this model on this device.
    """
    if config.rollout_backend == "vllm":
        from rlinf_lite.rollout.vllm_engine import VllmEngine

        return VllmEngine(
            config,
            tokenizer,
            model_dir=model_dir,
            shapes=shapes,
            eos_ids=eos_ids,
            seq_length=seq_length,
            sampling=sampling,
            device=device,
        )
    materialize(model, device)
    return BuiltinEngine(
        model,
        tokenizer,
        eos_ids=eos_ids,
        return_logprobs=config.return_logprobs,
        max_rows=config.max_running_requests,
    )
