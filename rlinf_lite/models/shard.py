"""Shard a model over ranks with FSDP2 or FSDP1, block by block. Gradients are summed, never averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import CustomPolicy
from transformers import PreTrainedModel

from rlinf_lite.config import FsdpConfig
from rlinf_lite.models.build import DTYPES

SMALL_BYTES = 16 << 20
"""The parameters of a model of at most so many bytes are one group, which stays whole until its gradients are reduced.
The hooks and collectives of more groups would take longer than what they compute. No number depends on the groups."""


def is_small(root: nn.Module) -> bool:
    return sum(param.nbytes for param in root.parameters()) <= SMALL_BYTES


def shard(root: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, config: FsdpConfig) -> None:
    """Shard each transformer block, then the rest of ``root`` (embeddings, norm, head), over dimension 0.

    Tied embeddings are in one group with the head, so they stay tied.
    """
    one_group = is_small(root)
    policy = _mixed_precision(config)
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if config.cpu_offload else OffloadPolicy()
    for module in [root] if one_group else [*blocks, root]:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=config.reshard_after_forward and not one_group,
        )
    for module in root.modules():
        if isinstance(module, FSDPModule):
            _sum_gradients(module)


def shard_flat(
    root: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, config: FsdpConfig, device: torch.device
) -> nn.Module:
    """Shard the same groups of parameters with FSDP1, which flattens each and gives every rank an equal slice of it.

    The parameters remain the same objects; afterwards each holds this rank's slice of it, flat, or nothing.

    Args:
        root: filled, and the same on every rank.
        device: to which the parameters are moved.

    Returns:
        What is called in place of ``root``.
    """
    param, reduce = _dtypes(config)
    precision = MixedPrecision(
        param_dtype=param, reduce_dtype=reduce, cast_forward_inputs=False, cast_root_forward_inputs=False
    )
    group, of_blocks = mesh.get_group(), set(blocks)
    inner = FullyShardedDataParallel(
        root,
        process_group=group,
        auto_wrap_policy=CustomPolicy(lambda module: module in of_blocks),
        mixed_precision=precision,
        device_id=device,
        use_orig_params=True,
    )
    # After a forward pass FSDP1 keeps the outermost group whole. The next pass would take it for current, also after a
    # load. So the outermost one is empty.
    outer = FullyShardedDataParallel(
        inner, process_group=group, mixed_precision=precision, device_id=device, use_orig_params=True
    )
    if mesh.size() > 1:
        outer.register_comm_hook(group, _sum_slices)
    return outer


def _sum_slices(group: dist.ProcessGroup, gradient: Tensor, own: Tensor) -> None:
    # In place of FSDP1's reduce-scatter, which divides by the number of ranks. Summed in the order of the ranks.
    received = torch.empty_like(gradient)
    dist.all_to_all_single(received, gradient, group=group)
    torch.sum(received.view(group.size(), -1), 0, out=own)


def reshard(root: nn.Module) -> None:
    """Leave no parameter whole after a forward pass, so that ``parameters()`` are the sharded ones."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks, in order: the modules that the model says must not be split."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _sum_gradients(module: FSDPModule) -> None:
    # The loss is already divided by the global token count, so gradients are summed over ranks. Averaging and
    # multiplying back would round twice unless the number of ranks is a power of two; gloo has no pre-multiplied sum.
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def _mixed_precision(config: FsdpConfig) -> MixedPrecisionPolicy:
    param, reduce = _dtypes(config)
    return MixedPrecisionPolicy(param_dtype=param, reduce_dtype=reduce, cast_forward_inputs=False)


def _dtypes(config: FsdpConfig) -> tuple[torch.dtype | None, torch.dtype | None]:
    """In which layers compute, and in which gradients are reduced."""
    param, reduce = config.mixed_precision.param_dtype, config.mixed_precision.reduce_dtype
    return DTYPES[param] if param else None, DTYPES[reduce] if reduce else None
