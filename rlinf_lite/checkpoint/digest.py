"""One hash of a whole sharded state, to tell whether two runs are bitwise identical."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor


def state_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, in the order of names. Collective where tensors are DTensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
