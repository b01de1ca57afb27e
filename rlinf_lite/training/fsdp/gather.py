"""Gathers the parameters of a small model on one machine without sockets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from rlinf_lite.node.exchange import NodeExchange
from rlinf_lite.training.fsdp.collectives import AllGather

_TIMEOUT_SECONDS = 1800.0
"""As gloo's."""


def connect(root: nn.Module, mesh: DeviceMesh) -> NodeExchange | None:
    """Let the parameters of a sharded model be gathered through shared memory. Collective.

    Returns:
        What also carries its gradients; None if these ranks have no shared memory, as those of several machines.
    """
    size = mesh.size()
    num_bytes = 0
    for param in root.parameters():
        rows = -(-param.shape[0] // size) * size if param.dim() else size  # padded, so that each rank has as many
        num_bytes += rows * param.shape[1:].numel() * max(param.dtype.itemsize, torch.float32.itemsize)
    exchange = NodeExchange.open(mesh.get_group(), num_bytes, _TIMEOUT_SECONDS)
    if exchange is not None:
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(_NearGather(exchange))
    return exchange


class _NearGather(AllGather):
    def __init__(self, exchange: NodeExchange) -> None:
        self._exchange = exchange

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As torch's default."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Has ended when it returns, also with ``async_op``."""
        parts = self._exchange.show(input_tensor)
        for whole, part in zip(output_tensor.view(len(parts), -1), parts, strict=True):
            whole.copy_(part)
