"""The device of a worker process, and what it computes with."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import torch

from rlinf_lite import numerics
from rlinf_lite.config import ClusterConfig


def fix_device(config: ClusterConfig, device: str) -> torch.device:
    """Fix threads and kernels before anything is computed; return the device of this process.

    Ray shows each worker its own GPU as number 0.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    return numerics.fix(device, threads=config.threads_per_worker, deterministic=config.deterministic)


def compute_capability(device: torch.device) -> str:
    """Name what decides which kernels run: the GPU and its libraries, or the processor and its vector instructions.

    Then the variables of the environment that change the choice, if the user has set any.
    """
    chosen = [f"{name}={value}" for name, value in numerics.kernel_settings().items()]
    return ", ".join([_gpu() if device.type == "cuda" else _processor(), *chosen])


def _gpu() -> str:
    return f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of a large matrix product in ``dtype``: what MFU refers to."""
    from rlinf_lite.models.products import product  # imports transformers, which not every worker does

    size = 4096 if device.type == "cuda" else 512
    one, seconds = torch.ones(size, size, device=device, dtype=dtype), []
    for _ in range(4):
        began = time.perf_counter()
        product(one, one, None)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)
