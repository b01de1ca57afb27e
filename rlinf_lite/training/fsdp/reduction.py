"""Sums gradients over ranks in the order of the slots, so that a sum is bit-exact on any number of ranks.

The order in which a reduce-scatter adds follows the number of ranks. Here each rank receives, by one exchange, what
every rank has for its shard, and adds these parts to a running sum, slot after slot. As many bytes are sent. In round r
rank k computes slot r * W + k, so for every number of ranks W the sum is ((slot 0 + slot 1) + slot 2) + ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rlinf_lite.errors import ConfigError
from rlinf_lite.node.exchange import NodeExchange
from rlinf_lite.training.fsdp.collectives import ReduceScatter


@dataclass(slots=True)
class _Turn:
    """The current round."""

    num_slots: int = 1
    is_last: bool = True


class GradientSum:
    """The gradients of a sharded model, from the first round of a mini-batch to its optimizer step."""

    def __init__(
        self,
        root: nn.Module,
        params: Sequence[nn.Parameter],
        *,
        num_ranks: int,
        in_place: bool,
        exchange: NodeExchange | None = None,
    ) -> None:
        """Replace the reduce-scatter of every FSDP module.

        Args:
            root: the sharded model; gradients must be summed, not averaged.
            params: all of its parameters.
            in_place: the first output of a reduction becomes the gradient, so the sum needs no memory of its own. FSDP2
                does this where it neither converts nor moves the output: reduction in the parameters' type, no offload.
            exchange: between the ranks, if there is one.
        """
        self._modules = [module for module in root.modules() if isinstance(module, FSDPModule)]
        self._params, self._turn = params, _Turn()
        self._must_share = in_place and num_ranks > 1
        self._sums = [_GroupSum(self._turn, exchange, in_place=in_place) for _ in self._modules]
        for module, group_sum in zip(self._modules, self._sums, strict=True):
            module.set_custom_reduce_scatter(group_sum)
            if num_ranks == 1 and not in_place:  # FSDP2 reduces nothing then, and adds rounded outputs
                module.set_all_reduce_hook(group_sum.add_alone)

    def begin(self) -> None:
        """Begin a mini-batch: drop all that an abandoned one has left."""
        self._release()
        for param in self._params:
            param.grad = None
        for module in self._modules:
            group = module._get_fsdp_state()._fsdp_param_group
            for shard in [] if group is None else group.fsdp_params:
                shard.unsharded_accumulated_grad = shard.unsharded_param.grad = None

    def begin_round(self, num_slots: int, *, is_last: bool) -> None:
        """
        Args:
            num_slots: slots of this round; ranks from this number on have none, and their zeros are not added.
            is_last: no round of this mini-batch follows.
        """
        self._turn.num_slots, self._turn.is_last = num_slots, is_last

    def reduce_next(self, reduce: bool) -> None:
        """Set whether the next backward pass ends the round; if not, its gradients stay on this rank."""
        for module in self._modules:
            module.set_requires_gradient_sync(reduce, recurse=False)

    def gradients(self) -> list[Tensor]:
        """Return this rank's shard of every gradient, summed."""
        found = [_local(param.grad) for param in self._params if param.grad is not None]
        totals = {group.total.untyped_storage().data_ptr() for group in self._sums if group.total is not None}
        if self._must_share and any(g.numel() and g.untyped_storage().data_ptr() not in totals for g in found):
            raise ConfigError(
                f"torch {torch.__version__}: FSDP2 copies what its reduction returns, so gradients are not the sums; "
                "install the torch that constraints.txt pins"
            )
        self._release()
        return found

    def _release(self) -> None:
        for group in self._sums:
            group.total = None


class ReducedGradients:
    """The same for a model sharded with FSDP1, which sums over ranks after each unit, in an order of its own."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self._params = params

    def begin(self) -> None:
        """As `GradientSum.begin`."""
        for param in self._params:
            param.grad = None

    def begin_round(self, num_slots: int, *, is_last: bool) -> None:
        """Rounds have no meaning here."""

    def reduce_next(self, reduce: bool) -> None:
        """Every backward pass is reduced."""

    def gradients(self) -> list[Tensor]:
        """Return this rank's slice of every gradient, summed."""
        for param in self._params:
            if param.grad is None and not param.numel():  # FSDP1 gives it none, and AdamW would not count its steps
                param.grad = torch.zeros_like(param)
        return [param.grad for param in self._params if param.grad is not None]


class _GroupSum(ReduceScatter):
    """The running sum of the gradients that FSDP2 reduces together, in float32: this rank's shard of them."""

    def __init__(self, turn: _Turn, exchange: NodeExchange | None, *, in_place: bool) -> None:
        self._turn, self._exchange, self._in_place = turn, exchange, in_place
        self.total: Tensor | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As torch's default."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        """Exchange parts and add them; FSDP2 adds the output to the gradient. Not called on one rank."""
        parts = self._parts(input_tensor, group)[: self._turn.num_slots]
        if self._in_place:
            self._add_in_place(output_tensor, parts)
        else:
            self._add(output_tensor, parts)

    def _parts(self, mine: Tensor, group: dist.ProcessGroup) -> Sequence[Tensor]:
        """What every rank has for this one."""
        if self._exchange is not None:
            return [whole.view(group.size(), -1)[group.rank()] for whole in self._exchange.show(mine)]
        received = torch.empty_like(mine)
        dist.all_to_all_single(received, mine, group=group)
        return received.view(group.size(), -1).unbind()

    def add_alone(self, output_tensor: Tensor) -> None:
        """As `__call__`, where there is one rank."""
        if output_tensor.is_cuda:  # FSDP2 runs hooks on another stream than the one that allocated it
            output_tensor.record_stream(torch.cuda.current_stream())
        self._add(output_tensor, [output_tensor])

    def _add_in_place(self, output: Tensor, parts: Sequence[Tensor]) -> None:
        if self.total is None:
            self.total, parts = output.copy_(parts[0]), parts[1:]
        else:
            output.zero_()
        for part in parts:
            self.total.add_(part)

    def _add(self, output: Tensor, parts: Sequence[Tensor]) -> None:
        if self.total is None:
            self.total = torch.empty_like(output, dtype=torch.float32).copy_(parts[0])
            parts = parts[1:]
        for part in parts:
            self.total.add_(part)
        if not self._turn.is_last:
            output.zero_()
            return
        output.copy_(self.total)
        self.total = None


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
