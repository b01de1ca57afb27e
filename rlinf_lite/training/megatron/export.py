"""The live weights under their Hugging Face names. Collective: each is gathered over the tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from rlinf_lite.training.megatron.model import MegatronModel
from rlinf_lite.weights.megatron.mapping import weights
from rlinf_lite.weights.pieces import WeightPiece
from rlinf_lite.weights.source import as_dtype


@torch.no_grad()
def whole(model: MegatronModel, dtype: torch.dtype) -> Iterator[WeightPiece]:
    """Every weight whole, in the order of ``model.names``, cast to ``dtype``: every rank must exhaust it."""
    params = dict(model.gpt.named_parameters())
    partition, group = model.partition, model.groups.tensor
    waiting: dict[str, Tensor] = {}
    order = iter(model.names.shapes)
    name = next(order)
    for weight in weights(partition.arch):
        mine = params[weight.name].detach()
        shards = [mine]
        if weight.is_sharded and group.size() > 1:
            shards = [torch.empty_like(mine) for _ in range(group.size())]
            dist.all_gather(shards, mine.contiguous(), group=group)
        waiting |= partition.join(weight, shards)
        while name in waiting:
            yield WeightPiece(name, 0, as_dtype(waiting.pop(name), dtype))
            name = next(order, "")
    assert not waiting, sorted(waiting)


def local_rows(model: MegatronModel, dtype: torch.dtype) -> Iterator[WeightPiece]:
    """This rank's rows of every weight: all ranks together have each row once. Collective, as `whole`."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for name, _, tensor in whole(model, dtype):
        first, stop = (len(tensor) * index // size for index in (rank, rank + 1))
        yield WeightPiece(name, first, tensor[first:stop].contiguous())
