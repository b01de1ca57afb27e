"""How vLLM is started: the environment that it reads when it is imported, and the arguments of its engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from rlinf_lite.config import ConfigError, RolloutConfig, SamplingConfig

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_CPU_BLOCK_TOKENS = 32
"""The smallest that its kernels like (vLLM's default is 128): a group shares the whole blocks of its prompt."""
_LARGEST_BLOCK_TOKENS = 64
"""Of the blocks that vLLM chooses on a GPU."""
_TOKENS_A_STEP = 8192


def runs_eager(settings: RolloutConfig, device: torch.device) -> bool:
    """Compiling takes a CPU longer than it gains."""
    return device.type == "cpu" if settings.enforce_eager is None else settings.enforce_eager


def prepare_environment(settings: RolloutConfig, device: torch.device) -> None:
    """Must come before anything imports vLLM."""
    os.environ.update(
        # The engine in this process, so that requests enter it all at once: when they came over a socket, how many
        # were there at the first step, and with that the bits, would be a matter of time.
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        # Threads are cluster.threads_per_worker (OMP_NUM_THREADS), nothing is bound: workers share cores here.
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_COMPUTE_NANS_IN_LOGITS="1",
        VLLM_RAISE_ON_LOGIT_NANS="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_BATCH_INVARIANT="1" if settings.batch_invariant else "0",
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device.type == "cpu" and runs_eager(settings, device):
        # Helpers that vLLM compiles even then would have a C++ compiler run for a minute in the first generation.
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        torch._dynamo.config.disable = True


def logprobs_mode(sampling: SamplingConfig) -> str:
    """Which of vLLM's log-probs are those at the sampling temperature, before top-k, top-p and penalties.

    Its raw ones are before the temperature too, its processed ones after everything; `config_checks` refuses what
    neither can say.
    """
    return "raw_logprobs" if not sampling.do_sample or sampling.temperature == 1.0 else "processed_logprobs"


def engine_arguments(
    settings: RolloutConfig, *, model_dir: Path, seq_length: int, sampling: SamplingConfig, device: torch.device
) -> dict[str, Any]:
    """For `vllm.LLM`; the size of its cache is not among them yet."""
    return {
        "model": str(model_dir),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "generation_config": "vllm",
        "dtype": _DTYPES[settings.model.precision],
        "max_model_len": seq_length,
        "max_num_seqs": settings.max_running_requests,
        "max_num_batched_tokens": max(_TOKENS_A_STEP, settings.max_running_requests),
        "block_size": _CPU_BLOCK_TOKENS if device.type == "cpu" else None,
        "tensor_parallel_size": settings.tensor_parallel_size,
        # Named, or it would start processes of its own through the Ray that this worker is in.
        "distributed_executor_backend": "uni" if settings.tensor_parallel_size == 1 else "mp",
        "worker_extension_cls": "rlinf_lite.rollout.vllm_worker.WeightReceiver",
        "enforce_eager": runs_eager(settings, device),
        "enable_prefix_caching": True,
        "async_scheduling": False,  # it schedules by what is done already: by the clock
        "enable_sleep_mode": settings.enable_sleep,
        "logprobs_mode": logprobs_mode(sampling),
        "disable_log_stats": True,
        "seed": 0,
    }


def cache_arguments(settings: RolloutConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """How much memory the cache gets: ``gpu_memory_utilization``, ``kv_cache_gb``, or just what
    ``max_running_requests`` sequences of full length need, so that none is ever put aside and computed again.

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
            f"rollout.model.model_path={arguments['model']}: its attention heads are {head} wide, and vLLM on a CPU "
            f"has kernels for {', '.join(map(str, sizes))}; use the builtin engine (of the embedded models, "
            "embedded:tiny-arithmetic-2heads fits)"
        )
    if settings.gpu_memory_utilization is not None:
        return {"gpu_memory_utilization": settings.gpu_memory_utilization}
    # With a fixed size vLLM does not use the utilization, but refuses to start where that part of a GPU is not free: by
    # default 0.9, of which an actor may have its share already.
    unused = {"gpu_memory_utilization": 0.01}
    if settings.kv_cache_gb is not None:
        return {"kv_cache_memory_bytes": int(settings.kv_cache_gb * 1e9)} | unused
    heads = max(1, model.get_total_num_kv_heads() // settings.tensor_parallel_size)
    token_bytes = 2 * model.get_total_num_hidden_layers() * heads * head * model.dtype.itemsize
    block = arguments["block_size"] or _LARGEST_BLOCK_TOKENS
    blocks = settings.max_running_requests * -(-arguments["max_model_len"] // block) + 2
    return {"kv_cache_memory_bytes": blocks * block * token_bytes} | unused
