"""Start-up of vLLM: the environment variables it reads at import, and the arguments of its engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from rlinf_lite.config import ConfigError, RolloutConfig, SamplingConfig
from rlinf_lite.config.fields import TYPE_NAMES

_CPU_BLOCK_TOKENS = 32
"""The smallest size its kernels are fast with (default: 128): a group shares only full blocks of its prompt."""
_LARGEST_BLOCK_TOKENS = 64
"""The largest that vLLM chooses on a GPU."""
_TOKENS_PER_STEP = 8192


def runs_eager(settings: RolloutConfig, device: torch.device) -> bool:
    """Whether vLLM runs without compilation. By default on CPUs, where compiling takes longer than it saves."""
    return device.type == "cpu" if settings.enforce_eager is None else settings.enforce_eager


def prepare_environment(settings: RolloutConfig, device: torch.device) -> None:
    """Set vLLM's environment variables. Call it before anything imports vLLM."""
    os.environ.update(
        # The engine runs in this process, so that all requests are there at the first step. Over a socket their number,
        # and with it the bits, would depend on timing.
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        # cluster.threads_per_worker sets the number of threads; no binding to cores, because workers share them.
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_COMPUTE_NANS_IN_LOGITS="1",
        VLLM_RAISE_ON_LOGIT_NANS="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_BATCH_INVARIANT="1" if settings.batch_invariant else "0",
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device.type == "cuda":
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a process that has used CUDA cannot be forked
    if device.type == "cpu" and runs_eager(settings, device):
        # vLLM compiles some functions even in eager mode, which would take a C++ compiler a minute at first use.
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        torch._dynamo.config.disable = True


def logprobs_mode(sampling: SamplingConfig) -> str:
    """Choose vLLM's log-probs at the sampling temperature, before top-k, top-p and penalties.

    Its raw log-probs are before the temperature too, its processed ones after everything; the config refuses settings
    that neither covers.
    """
    return "raw_logprobs" if not sampling.do_sample or sampling.temperature == 1.0 else "processed_logprobs"


def engine_arguments(
    settings: RolloutConfig, *, model_dir: Path, seq_length: int, sampling: SamplingConfig, device: torch.device
) -> dict[str, Any]:
    """Arguments for `vllm.LLM`, except those of `cache_arguments`."""
    return {
        "model": str(model_dir),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "generation_config": "vllm",
        "dtype": TYPE_NAMES[settings.model.precision],
        "max_model_len": seq_length,
        "max_num_seqs": settings.max_running_requests,
        "max_num_batched_tokens": max(_TOKENS_PER_STEP, settings.max_running_requests),
        "block_size": _CPU_BLOCK_TOKENS if device.type == "cpu" else None,
        "tensor_parallel_size": settings.tensor_parallel_size,
        # Set explicitly, or vLLM would start processes through the Ray cluster that this worker belongs to.
        "distributed_executor_backend": "uni" if settings.tensor_parallel_size == 1 else "mp",
        "worker_extension_cls": "rlinf_lite.rollout.vllm_worker.WeightReceiver",
        "enforce_eager": runs_eager(settings, device),
        "enable_prefix_caching": True,
        "async_scheduling": False,  # its schedule depends on what has finished: on timing
        "enable_sleep_mode": settings.enable_sleep,
        "logprobs_mode": logprobs_mode(sampling),
        "disable_log_stats": True,
        "seed": 0,
    }


def cache_arguments(settings: RolloutConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """Size of the KV cache: ``gpu_memory_utilization``, ``kv_cache_gb``, or what ``max_running_requests`` sequences of
    full length need, so that none is ever preempted and recomputed.

    Raises:
        ConfigError: vLLM has no kernel for the model's attention heads here.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    model = EngineArgs(**arguments).create_model_config()
    head, sizes = model.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if current_platform.is_cpu() and head not in sizes:
        raise ConfigError(
            f"rollout.model.model_path={arguments['model']}: its attention heads have size {head}, and vLLM on a CPU "
            f"has kernels for {', '.join(map(str, sizes))}; use the builtin engine (of the embedded models, "
            "embedded:tiny-arithmetic-2heads fits)"
        )
    if settings.gpu_memory_utilization is not None:
        return {"gpu_memory_utilization": settings.gpu_memory_utilization}
    # With a fixed size vLLM does not use the utilization, but refuses to start if that fraction of the GPU is not free:
    # 0.9 by default, of which an actor may use a part already.
    unused = {"gpu_memory_utilization": 0.01}
    if settings.kv_cache_gb is not None:
        return {"kv_cache_memory_bytes": int(settings.kv_cache_gb * 1e9)} | unused
    heads = max(1, model.get_total_num_kv_heads() // settings.tensor_parallel_size)
    token_bytes = 2 * model.get_total_num_hidden_layers() * heads * head * model.dtype.itemsize
    block = arguments["block_size"] or _LARGEST_BLOCK_TOKENS
    blocks = settings.max_running_requests * -(-arguments["max_model_len"] // block) + 2
    return {"kv_cache_memory_bytes": blocks * block * token_bytes} | unused
