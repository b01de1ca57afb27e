"""Adam whose state is ``distrib_optim.pt``: parameters of one rank in one flat buffer, in Megatron's order.

Data-parallel rank i owns the i-th slice of it: its first and second moment, and the float32 parameters that the
optimizer changes (with float32 parameters these are the parameters themselves). Gradients are summed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlinf_lite.config import OptimConfig
from rlinf_lite.weights.megatron.files import PARTS
from rlinf_lite.weights.megatron.packing import Slot, slots

_MULTIPLE = 128


class FlatAdam:
    """ZeRO-1 AdamW. As in Megatron, vectors (norms, biases) have no weight decay."""

    def __init__(self, params: Mapping[str, nn.Parameter], group: dist.ProcessGroup, optim: OptimConfig) -> None:
        """Move the parameters into one buffer.

        Args:
            params: in the order of ``named_parameters()``.
            group: the data-parallel ranks.
        """
        self.params, self._group = dict(params), group
        first = next(iter(params.values()))
        self.dtype, device = first.dtype, first.device
        self.slots = slots({name: tuple(param.shape) for name, param in params.items()})
        self.num_floats = self.slots[-1].stop
        """Megatron's ``numel_unpadded``."""
        multiple = math.lcm(group.size(), _MULTIPLE)
        padded = -(-self.num_floats // multiple) * multiple
        size = padded // group.size()
        self.own = slice(size * group.rank(), size * (group.rank() + 1))
        """This rank's slice."""
        self._values = torch.zeros(padded, dtype=self.dtype, device=device)
        self._gradient = torch.zeros(padded, dtype=torch.float32, device=device)
        self.own_gradient: Tensor | None = None
        """This rank's slice of the gradient; None until `reduce`."""
        self._place_parameters()
        own_values = self._values[self.own]
        self.flat = {"param": own_values if self.dtype == torch.float32 else own_values.float()}
        self.flat |= {name: torch.zeros(size, device=device) for name in PARTS[1:]}
        """float32, this rank's slice of each of the `PARTS`."""
        self.adam, self._views = self._build_adam(optim)
        self.num_steps = 0
        """Steps that were taken: skipped ones do not count."""

    def _place_parameters(self) -> None:
        for slot in self.slots:
            param = self.params[slot.name]
            place = self._values[slot.start : slot.stop].view_as(param)
            place.copy_(param.data)
            param.data = place
            # Summed over units in float32, whatever the type of the parameters.
            total = self._gradient[slot.start : slot.stop].view_as(param)
            param.register_post_accumulate_grad_hook(_added_to(total))

    def _build_adam(self, optim: OptimConfig) -> tuple[torch.optim.AdamW, list[tuple[nn.Parameter, slice]]]:
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        views, states = [], {}
        for slot, place in self.own_places():
            view = nn.Parameter(self.flat["param"][place])
            groups[self.has_decay(slot.name)].append(view)
            views.append((view, place))
            averages = {name: self.flat[name][place] for name in PARTS[1:]}
            states[view] = {"step": torch.tensor(0.0), **averages}
        adam = torch.optim.AdamW(
            [
                {"params": found, "weight_decay": optim.weight_decay if has_decay else 0.0}
                for has_decay, found in groups.items()
            ],
            lr=optim.lr,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_eps,
            foreach=True,
        )
        for view, state in states.items():
            adam.state[view] = state
        return adam, views

    def has_decay(self, name: str) -> bool:
        """Whether weight decay applies to a parameter."""
        return self.params[name].dim() > 1

    def own_places(self) -> Iterator[tuple[Slot, slice]]:
        """Each parameter of which this rank has a part, and where that is in this rank's slice."""
        for slot in self.slots:
            start, stop = max(slot.start, self.own.start), min(slot.stop, self.own.stop)
            if start < stop:
                yield slot, slice(start - self.own.start, stop - self.own.start)

    # -- one step

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The gradient of each parameter on this rank, float32, before it is summed over data-parallel ranks."""
        for slot in reversed(self.slots):
            yield slot.name, self._gradient[slot.start : slot.stop].view_as(self.params[slot.name])

    def drop_gradients(self) -> None:
        """Set them to 0."""
        self._gradient.zero_()
        self.own_gradient = None

    def reduce(self, partial: Sequence[str], tensor_group: dist.ProcessGroup) -> None:
        """Sum gradients over data-parallel ranks; each keeps its slice.

        Args:
            partial: parameters whose gradients are first summed over the tensor-parallel ranks ``tensor_group``: all
                have the same values, but each has seen only its own heads or tokens.
        """
        gradients = dict(self.gradients())
        if tensor_group.size() > 1:
            for name in partial:
                dist.all_reduce(gradients[name], group=tensor_group)
        self.own_gradient = self._gradient
        if self._group.size() > 1:
            self.own_gradient = torch.empty_like(self.flat["exp_avg"])
            dist.reduce_scatter_tensor(self.own_gradient, self._gradient, group=self._group)

    def unscale(self, scale: float) -> None:
        """Divide the reduced gradients by the factor that the loss was multiplied with."""
        assert self.own_gradient is not None, "called before reduce"
        self.own_gradient.mul_(1.0 / scale)

    def reduced(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of each reduced gradient."""
        assert self.own_gradient is not None, "called before reduce"
        for slot, place in self.own_places():
            yield slot.name, self.own_gradient[place]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Change the parameters by the reduced gradients, which are 0 afterwards."""
        assert self.own_gradient is not None, "called before reduce"
        for group in self.adam.param_groups:
            group["lr"] = lr
        for view, place in self._views:
            view.grad = self.own_gradient[place]
        self.adam.step()
        self.num_steps += 1
        for view, _ in self._views:
            view.grad = None
        self.publish()
        self.drop_gradients()

    @torch.no_grad()
    def publish(self) -> None:
        """Give the parameters the values of the optimizer's slices."""
        if self._group.size() == 1 and self.dtype == torch.float32:
            return  # they are the same memory
        mine = self.flat["param"].to(self.dtype, copy=True)
        if self._group.size() == 1:
            self._values.copy_(mine)
        else:
            dist.all_gather_into_tensor(self._values, mine, group=self._group)

    # -- its state

    @torch.no_grad()
    def load(self, part: str, name: str, values: Tensor) -> None:
        """Copy into one of the `PARTS` what this rank has of the ``values`` of a parameter."""
        for slot, place in self.own_places():
            if slot.name == name:
                first = self.own.start + place.start - slot.start
                self.flat[part][place].copy_(values.reshape(-1)[first : first + place.stop - place.start])

    @torch.no_grad()
    def follow_parameters(self) -> None:
        """Take the values of parameters that were changed from outside."""
        if self.dtype != torch.float32:
            self.flat["param"].copy_(self._values[self.own])

    def set_num_steps(self, number: int) -> None:
        """Set the number of steps that were taken, which Adam's bias correction follows."""
        self.num_steps = number
        for state in self.adam.state.values():
            state["step"].fill_(float(number))


def _added_to(total: Tensor) -> Callable[[Tensor], None]:
    def add(param: Tensor) -> None:
        assert param.grad is not None
        total.add_(param.grad)
        param.grad = None

    return add
