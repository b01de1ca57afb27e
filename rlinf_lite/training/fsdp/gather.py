"""Gathers the parameters of a small model on one machine without sockets."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

from rlinf_lite.node.exchange import NodeExchange

_TIMEOUT_SECONDS = 1800.0
"""As gloo's."""


def connect(root: nn.Module, mesh: DeviceMesh) -> NodeExchange | None:
    """Let the parameters of a sharded model be gathered through shared memory. Collective.

    Returns:
        What also carries its gradients; None if not all ranks run on one machine.
    """
    size = mesh.size()
    rows = {param: -(-param.shape[0] // size) * size if param.dim() else size for param in root.parameters()}
    num_elements = sum(count * param.shape[1:].numel() for param, count in rows.items())
    exchange = NodeExchange.open(mesh.get_group(), 4 * num_elements, _TIMEOUT_SECONDS)
    if exchange is not None:
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(_NearGather(exchange))
    return exchange


class _NearGather(DefaultAllGather):
    def __init__(self, exchange: NodeExchange) -> None:
        self._exchange = exchange

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        if not self._exchange.fits(input_tensor.nbytes):
            return super().__call__(output_tensor, input_tensor, group, async_op)
        parts = self._exchange.share(input_tensor)
        for whole, part in zip(output_tensor.view(len(parts), -1), parts, strict=True):
            whole.copy_(part)
        return None
