"""Shard a model over ranks with FSDP2, block by block. Gradients are summed, never averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from rlinf_lite.config import FsdpConfig
from rlinf_lite.models.build import DTYPES


def shard(root: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, config: FsdpConfig) -> None:
    """Shard each transformer block, then the rest of ``root`` (embeddings, norm, head), over dimension 0.

    Tied embeddings are in one group with the head, so they stay tied.
    """
    policy = _mixed_precision(config)
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if config.cpu_offload else OffloadPolicy()
    for module in [*blocks, root]:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=config.reshard_after_forward,
        )
    for module in root.modules():
        if isinstance(module, FSDPModule):
            _sum_gradients(module)


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
    param, reduce = config.mixed_precision.param_dtype, config.mixed_precision.reduce_dtype
    return MixedPrecisionPolicy(
        param_dtype=DTYPES[param] if param else None,
        reduce_dtype=DTYPES[reduce] if reduce else None,
        cast_forward_inputs=False,
    )
