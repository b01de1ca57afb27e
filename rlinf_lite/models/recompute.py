"""Activations that are cheap to compute again are not kept for the backward pass. No bit of it changes.

They are the outputs of norms and, in a gated MLP, what lies between its matrix products: half of what a Llama keeps. No
matrix product is computed again, as it is with gradient checkpointing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
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
    if not (isinstance(one, FunctionType) and isinstance(other, FunctionType)):
        return False
    return (one.__code__.co_code, one.__code__.co_names) == (other.__code__.co_code, other.__code__.co_names)


class _Again:
    """A tensor that is computed when the backward pass needs it, and held until it was needed for the last time."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._uses = 0
        """How many operations still need it for their gradients."""
        self._value: Tensor | None = None

    def is_needed(self) -> None:
        """By one more operation."""
        self._uses += 1

    def take(self) -> Tensor:
        """For one of the operations that need it."""
        value = self.look()
        self._uses -= 1
        if self._uses <= 0:
            self._value = None
        return value

    def look(self) -> Tensor:
        """For another tensor that is computed from it."""
        value = self._compute() if self._value is None else self._value
        if self._uses > 0:
            self._value = value
        return value


class _Dropped:
    """What one block's forward pass drops, by address. All is held until the pass has ended, so that no other tensor
    gets an address that is known."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int, _Again]] = {}
        """Address -> what is there, its version, and how to have it again."""

    def add(self, tensor: Tensor, compute: Callable[[], Tensor]) -> _Again:
        """To be called before an operation may save ``tensor``."""
        again = _Again(compute)
        self._known[tensor.data_ptr()] = tensor.detach(), tensor._version, again
        return again

    def clear(self) -> None:
        self._known.clear()

    def pack(self, tensor: Tensor) -> Any:
        """What autograd is to keep in place of a tensor that it wants to save."""
        known, version, again = self._known.get(tensor.data_ptr(), (None, 0, None))
        if known is None or again is None or tensor._version != version or not _have_equal_values(known, tensor):
            return tensor
        again.is_needed()
        return again, tensor.shape


def _have_equal_values(one: Tensor, other: Tensor) -> bool:
    """Of two tensors that begin at one address; shapes may differ."""
    return (
        one.dtype == other.dtype and one.numel() == other.numel() > 0 and one.is_contiguous() and other.is_contiguous()
    )


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    again, shape = kept
    with torch.no_grad():
        return again.take().view(shape)


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
    theirs: Callable[[Tensor], Tensor],
    ours: Callable[[_Dropped, Any, Tensor], Tensor],
    hidden: Tensor,
) -> Tensor:
    return ours(dropped, module, hidden) if torch.is_grad_enabled() else theirs(hidden)


def _normalize(dropped: _Dropped, norm: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    """As `LlamaRMSNorm.forward`."""
    given, weight = hidden.detach(), norm.weight.detach()
    wide = hidden.to(torch.float32)
    if wide is not hidden:
        wider = dropped.add(wide, lambda: given.to(torch.float32))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    normal = (wide * scale).to(hidden.dtype)
    factor = scale.detach()
    if wide is hidden:
        again = dropped.add(normal, lambda: given * factor)
    else:
        again = dropped.add(normal, lambda: (wider.look() * factor).to(given.dtype))
    output: Tensor = norm.weight * normal
    dropped.add(output, lambda: weight * again.look())
    return output


def _gated_mlp(dropped: _Dropped, mlp: LlamaMLP, hidden: Tensor) -> Tensor:
    """As `LlamaMLP.forward`."""
    gate = mlp.gate_proj(hidden)
    given = gate.detach()
    active = mlp.act_fn(gate)
    again = dropped.add(active, lambda: mlp.act_fn(given))
    up = mlp.up_proj(hidden)
    other = up.detach()
    product = active * up
    dropped.add(product, lambda: again.look() * other)
    output: Tensor = mlp.down_proj(product)
    return output
