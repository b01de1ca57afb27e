"""What FSDP2 calls to gather parameters and to reduce gradients: torch has no public names for these interfaces."""

from __future__ import annotations

import torch

from rlinf_lite.errors import ConfigError

try:
    from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
except ImportError as error:
    raise ConfigError(
        f"torch {torch.__version__}: FSDP2's collectives cannot be replaced ({error}), so the order of sums cannot be "
        "fixed; install the torch that constraints.txt pins"
    ) from None

__all__ = ["AllGather", "ReduceScatter"]
