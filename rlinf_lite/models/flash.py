"""FlashAttention-2 on packed sequences, from torch itself: what `Forest` computes on a GPU in bf16 and fp16.

Not run on a GPU yet: that its decoding has the bits of its forward pass over whole sequences is a design, not a
measurement. float32, soft-caps and heads that it does not take are computed as on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlinf_lite.models.attention import Rule


def fits(q_HND: Tensor, v_KNE: Tensor, rule: Rule) -> bool:
    """Whether the kernels take these heads."""
    dim = q_HND.shape[-1]
    fast = q_HND.is_cuda and q_HND.dtype in (torch.bfloat16, torch.float16)
    return fast and rule.softcap is None and dim == v_KNE.shape[-1] and dim % 8 == 0 and dim <= 256


def attend_paths(
    q_HND: Tensor,
    k_KND: Tensor,
    v_KNE: Tensor,
    paths: Sequence[np.ndarray],
    depths: Sequence[int],
    rule: Rule,
) -> Tensor:
    """Attention [N, H, E] of segments: queries are a segment's own tokens, keys its path, causal from the bottom right.

    Args:
        paths: per segment the indices of its keys; its own tokens are the last ones.
        depths: per segment the number of keys before its own.
    """
    members = [(path, depth) for path, depth in zip(paths, depths, strict=True) if len(path) > depth]
    num_queries = [len(path) - depth for path, depth in members]
    num_keys = [len(path) for path, _ in members]
    device = q_HND.device
    key_index = torch.from_numpy(np.concatenate([path for path, _ in members])).to(device)
    ends = [torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32, device=device) for sizes in (num_queries, num_keys)]
    out: Tensor = _Varlen.apply(
        q_HND.transpose(0, 1).contiguous(),  # segments own their tokens end to end, in order
        k_KND.transpose(0, 1).index_select(0, key_index),
        v_KNE.transpose(0, 1).index_select(0, key_index),
        (*ends, max(2, *num_queries), max(num_keys)),  # with one query per sequence another kernel runs
        rule,
    )
    return out


def attend_slots(q_HRD: Tensor, k_RKPD: Tensor, v_RKPE: Tensor, position_R: Tensor, rule: Rule) -> Tensor:
    """Attention [R, H, E] of one token per row over the cache, which is copied into the kernel's layout."""
    rows, _, room, _ = k_RKPD.shape
    keys, values = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (k_RKPD, v_RKPE))
    ends = torch.arange(rows + 1, dtype=torch.int32, device=q_HRD.device)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q_HRD.transpose(0, 1).contiguous(),
        *(keys, values, ends, ends * room, 2, room, 0.0, True, False),
        scale=rule.scaling,
        seqused_k=(position_R + 1).int(),
        **_window(rule),
    )[0]
    return out


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: tuple[Any, ...], rule: Rule) -> Tensor:
        out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *layout, 0.0, True, False, scale=rule.scaling, **_window(rule)
        )
        ctx.save_for_backward(q, k, v, out, lse, state, unused)
        ctx.layout, ctx.rule = layout, rule
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, state, unused = ctx.saved_tensors
        grads = torch.ops.aten._flash_attention_backward(
            grad_outputs[0].contiguous(),
            *(q, k, v, out, lse),
            *ctx.layout,
            *(0.0, True, state, unused),
            scale=ctx.rule.scaling,
            **_window(ctx.rule),
        )
        return (*grads, None, None)


def _window(rule: Rule) -> dict[str, int]:
    return {} if rule.window is None else {"window_size_left": rule.window - 1, "window_size_right": 0}
