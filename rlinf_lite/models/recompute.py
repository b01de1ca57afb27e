"""Activations that are cheap to compute again are not kept for the backward pass. No bit changes.

They are the outputs of norms and, in a gated MLP, what lies between its matrix products: half of what a Llama keeps. No
matrix product is computed again, as it is with gradient checkpointing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


def recompute_cheap(blocks: Iterable[nn.Module]) -> None:
    """From now on, drop what is cheap to compute again in these transformer blocks' forward passes.

    Norms and MLPs of other forms than Llama's, which most architectures share, keep everything.
    """
    for block in blocks:
        dropped = _Dropped()
        block.forward = functools.partial(_forward_block, dropped, block.forward)
        for module in block.modules():
            for theirs, ours in ((LlamaRMSNorm, _normalize), (LlamaMLP, _gated_mlp)):
                if _has_the_code_of(theirs, module):
                    module.forward = functools.partial(_forward_part, dropped, module, module.forward, ours)


def _has_the_code_of(known: type[nn.Module], module: nn.Module) -> bool:
    """Whether the module computes what ``known`` does: transformers copies such code from model to model."""
    one, other = type(module).forward, known.forward
    if "forward" in vars(module) or not (isinstance(one, FunctionType) and isinstance(other, FunctionType)):
        return False
    return _code(one) == _code(other) and not one.__code__.co_freevars  # a decorator would have some


def _code(function: FunctionType) -> tuple[object, ...]:
    code = function.__code__
    constants = [value for value in code.co_consts if not isinstance(value, str)]  # without the docstring
    return code.co_code, code.co_names, code.co_argcount, constants


class _Kept:
    """A tensor that is kept. As in autograd itself, it may not be changed in place before its last use."""

    def __init__(self, tensor: Tensor) -> None:
        # Without its history: otherwise an operation that keeps its own output would own itself, and never be freed.
        self._tensor, self._version = tensor.detach(), tensor._version

    def value(self) -> Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                "a tensor that the backward pass needs was changed by an operation in place: "
                f"{self._tensor.dtype} {list(self._tensor.shape)}, version {self._tensor._version}, not {self._version}"
            )
        return self._tensor

    def value_for_use(self) -> Tensor:
        return self.value()


class _Recomputed:
    """A tensor that is computed when the backward pass needs it, and held until it was needed for the last time."""

    def __init__(self, compute: Callable[..., Tensor], inputs: Sequence[_Kept | _Recomputed]) -> None:
        self._compute, self._inputs = compute, inputs
        self._uses = 0
        """How many operations still need it for their gradients."""
        self._value: Tensor | None = None

    def add_use(self) -> None:
        """One more operation needs it."""
        self._uses += 1

    def value_for_use(self) -> Tensor:
        """For one of the operations that need it."""
        value = self.value()
        self._uses -= 1
        if self._uses <= 0:
            self._value = None
        return value

    def value(self) -> Tensor:
        """For another tensor that is computed from it."""
        value = self._value
        if value is None:
            value = self._compute(*(each.value() for each in self._inputs))
        if self._uses > 0:
            self._value = value
        return value


class _Dropped:
    """What one block's forward pass drops, by address. All is held until the pass has ended, so that no other tensor
    gets an address that is known."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int, _Recomputed]] = {}
        """Address -> what is there, its version, and how to have it again."""

    def add(self, tensor: Tensor, compute: Callable[..., Tensor], *inputs: _Kept | _Recomputed) -> _Recomputed:
        """``tensor`` is ``compute(*inputs)``. To be called before an operation may save it."""
        again = _Recomputed(compute, inputs)
        self._known[tensor.data_ptr()] = tensor.detach(), tensor._version, again
        return again

    def clear(self) -> None:
        self._known.clear()

    def pack(self, tensor: Tensor) -> tuple[_Kept | _Recomputed, torch.Size]:
        """What autograd is to keep in place of a tensor that it wants to save."""
        known, version, again = self._known.get(tensor.data_ptr(), (None, 0, None))
        if known is None or again is None or tensor._version != version or not _have_equal_values(known, tensor):
            return _Kept(tensor), tensor.shape
        again.add_use()
        return again, tensor.shape


def _have_equal_values(one: Tensor, other: Tensor) -> bool:
    """Of two tensors that begin at one address; shapes may differ."""
    return (
        one.dtype == other.dtype and one.numel() == other.numel() > 0 and one.is_contiguous() and other.is_contiguous()
    )


def _unpack(packed: tuple[_Kept | _Recomputed, torch.Size]) -> Tensor:
    source, shape = packed
    with torch.no_grad():
        return source.value_for_use().view(shape)


def _forward_block(dropped: _Dropped, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    try:
        with saved_tensors_hooks(dropped.pack, _unpack):
            return forward(*args, **kwargs)
    finally:
        dropped.clear()


def _forward_part(
    dropped: _Dropped,
    module: nn.Module,
    theirs: Callable[..., Tensor],
    ours: Callable[[_Dropped, Any, Tensor], Tensor],
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    if not torch.is_grad_enabled() or len(args) != 1 or kwargs:
        return theirs(*args, **kwargs)
    return ours(dropped, module, args[0])


def _normalize(dropped: _Dropped, norm: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    """As `LlamaRMSNorm.forward`."""
    dtype, given = hidden.dtype, _Kept(hidden)
    wide = hidden.to(torch.float32)
    wider = given if wide is hidden else dropped.add(wide, lambda hidden: hidden.to(torch.float32), given)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    normal = (wide * scale).to(dtype)
    again = dropped.add(normal, lambda wide, scale: (wide * scale).to(dtype), wider, _Kept(scale))
    output: Tensor = norm.weight * normal
    dropped.add(output, torch.mul, _Kept(norm.weight), again)
    return output


def _gated_mlp(dropped: _Dropped, mlp: LlamaMLP, hidden: Tensor) -> Tensor:
    """As `LlamaMLP.forward`."""
    gate = mlp.gate_proj(hidden)
    given = _Kept(gate)
    active = mlp.act_fn(gate)
    again = dropped.add(active, mlp.act_fn, given)
    up = mlp.up_proj(hidden)
    product = active * up
    dropped.add(product, torch.mul, again, _Kept(up))
    output: Tensor = mlp.down_proj(product)
    return output
