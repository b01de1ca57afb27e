"""What every worker process does first, and how processes of one job meet."""

from __future__ import annotations

import platform
import socket
from pathlib import Path

import ray
import torch
import torch.distributed as dist

from rlinf_lite import numerics
from rlinf_lite.config import Config


def prepare(config: Config, device: str) -> torch.device:
    """Fix threads and kernels, before anything is computed; returns the device of this process.

    Ray shows each worker its own GPU as number 0.
    """
    settings = config.cluster
    return numerics.fix(device, threads=settings.threads_per_worker, deterministic=settings.deterministic)


def serve_store(world_size: int) -> tuple[dist.TCPStore, tuple[str, int]]:
    """A rendezvous on a port that the system chooses."""
    host = ray.util.get_node_ip_address()
    listener = socket.create_server(("", 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host, port, world_size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return store, (host, port)


def compute_capability(device: torch.device) -> str:
    """What decides which kernels run: the GPU and its libraries, or the processor and its vector instructions."""
    if device.type == "cuda":
        return (
            f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
