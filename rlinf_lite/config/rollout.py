"""The ``rollout`` section: the engine that generates responses."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import Field

from rlinf_lite.config.fields import Count, Neutral, PathText, PositiveFraction, Precision, Section, follows


class RolloutModelConfig(Section):
    model_path: Neutral[PathText] = follows("actor.model.model_path")
    """Where the engine reads the architecture from. Its weights are always the actor's."""
    model_type: Neutral[str | None] = follows("actor.model.model_type")
    """As ``actor.model.model_type``."""
    precision: Precision = follows("actor.model.precision")
    """Type in which the engine computes."""


class RolloutConfig(Section):
    group_name: Neutral[str] = "RolloutGroup"
    """Name of the rollout workers in logs."""
    rollout_backend: Literal["builtin", "vllm"] = "builtin"
    """``builtin``: the transformers model with counter-based sampling; ``vllm``: vLLM, which is installed separately
    (see ``docs/vllm.md``)."""
    model: RolloutModelConfig = Field(default_factory=RolloutModelConfig)
    max_running_requests: Count = 64
    """Sequences generated together. With vLLM it and ``group_size`` determine the generation batches, so it can change
    bits; the builtin engine's responses do not depend on it."""
    return_logprobs: bool = False
    """The engine reports log-probs (needed if they are not recomputed)."""
    gpu_memory_utilization: PositiveFraction | None = None
    """vLLM only: fraction of the GPU's memory (on a CPU: of all memory) for its weights and cache. The size of the
    cache then depends on the memory that is free at the start, and so does what vLLM preempts when it is full."""
    kv_cache_gb: Annotated[float, Ge(0.001), Le(1e5)] | None = None
    """vLLM only: size of the cache of each of its processes, in GB (1e9 bytes). If this and
    ``gpu_memory_utilization`` are null, it is just large enough for ``max_running_requests`` sequences of
    ``runner.seq_length`` tokens."""
    enforce_eager: bool | None = None
    """vLLM only: false: compile the model and capture CUDA graphs; null: true on a CPU, false on a GPU."""
    tensor_parallel_size: Count = 1
    """vLLM only: number of processes that one engine spreads each layer over; on GPUs also its number of slots, which
    must be on one node."""
    enable_sleep: Neutral[bool] = False
    """vLLM on GPUs only: between generation and the next weights the engine frees its GPU memory, for an actor on the
    same GPU."""
    batch_invariant: bool = False
    """vLLM on GPUs only: its slower kernels, whose bits do not depend on what else is in the batch."""
