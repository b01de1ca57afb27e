"""FlashAttention-2 on packed sequences, from torch itself: what `Forest` computes on a GPU in bf16 and fp16.

Its decoding has the bits of its forward pass over whole sequences (tests/gpu/test_gpu_engine.py). float32, soft-caps
and heads that it does not take are computed as on a CPU.
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


class Packed:
    """Segments as the kernels take them: queries are a segment's own tokens, keys its path."""

    def __init__(self, paths: Sequence[np.ndarray], depths: Sequence[int], device: torch.device | None) -> None:
        """
        Args:
            paths: per segment the indices of its keys; its own tokens are the last ones.
            depths: per segment the number of keys before its own.
        """
        members = [(path, depth) for path, depth in zip(paths, depths, strict=True) if len(path) > depth]
        num_queries = [len(path) - depth for path, depth in members]
        num_keys = [len(path) for path, _ in members]
        self._key_index = torch.from_numpy(np.concatenate([path for path, _ in members])).to(device)
        self._layout = (
            *(
                torch.from_numpy(np.cumsum([0, *sizes]).astype(np.int32)).to(device)
                for sizes in (num_queries, num_keys)
            ),
            max(2, *num_queries),  # with one query per sequence another kernel runs
            max(num_keys),
        )

    def attend(self, q_HND: Tensor, k_KND: Tensor, v_KNE: Tensor, rule: Rule) -> Tensor:
        """Attention [N, H, E], causal from the last query and the last key."""
        out: Tensor = _Varlen.apply(
            q_HND.transpose(0, 1).contiguous(),  # segments own their tokens end to end, in order
            k_KND.transpose(0, 1).index_select(0, self._key_index),
            v_KNE.transpose(0, 1).index_select(0, self._key_index),
            self._layout,
            rule,
        )
        return out


def attend_slots(
    q_HRD: Tensor, k_SPKD: Tensor, v_SPKE: Tensor, first_key_R: Tensor, num_keys_R: Tensor, rule: Rule
) -> Tensor:
    """Attention [R, H, E] of one token per row over its slot in a cache of S slots.

    Args:
        first_key_R: int32 [R + 1]: where each row's slot begins, among all S * P places; the last is not used.
        num_keys_R: int32: keys that it sees, unless there is a window.
    """
    (heads, rows, _), kv_heads = q_HRD.shape, k_SPKD.shape[2]
    # The query heads that share keys are queries of one sequence, so that its keys are read once; all of them see all
    # of its keys. A window would count from the last query: then each head reads the keys.
    group = heads // kv_heads if rule.window is None else 1
    q = q_HRD.transpose(0, 1)
    if group > 1:
        q = q.unflatten(1, (kv_heads, group)).transpose(1, 2).flatten(0, 1)
    first_query_R = torch.arange(rows + 1, dtype=torch.int32, device=q.device) * group
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q.contiguous(),
        *(k_SPKD.flatten(0, 1), v_SPKE.flatten(0, 1), first_query_R, first_key_R),
        # With one query per sequence another kernel runs, which splits the keys.
        *(max(2, group), k_SPKD.shape[1], 0.0, group == 1, False),
        scale=rule.scaling,
        seqused_k=num_keys_R,
        **_window(rule),
    )[0]
    if group > 1:
        out = out.unflatten(0, (rows, group)).transpose(1, 2).flatten(1, 2)
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
