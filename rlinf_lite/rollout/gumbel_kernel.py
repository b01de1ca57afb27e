"""`gumbel.draw` as one pass over the logits on a GPU, in Triton: the same tokens as with numpy and torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlinf_lite.rollout import gumbel

_BLOCK = 4096
"""Tokens per program."""


def draw(logits_RV: Tensor, temperature: Tensor, words_R2: Tensor, t_R: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a token per row, as `gumbel.draw_on_device`.

    Args:
        logits_RV: each row's elements side by side.
        temperature: float64 [1]. A Python float would reach the kernel as float32.
        words_R2, t_R: int32.

    Returns:
        The tokens int64 [R], and the score float64 [R] of each, which is not finite if no token can be drawn.
    """
    low_R, high_R = gumbel.row_words_on_device(words_R2, t_R)
    (rows, vocabulary), blocks = logits_RV.shape, triton.cdiv(logits_RV.shape[1], _BLOCK)
    best = logits_RV.new_empty(rows, blocks, dtype=torch.float64)
    token = logits_RV.new_empty(rows, blocks, dtype=torch.int32)
    _best_of_block[(rows, blocks)](
        *(logits_RV, low_R, high_R, temperature, best, token, vocabulary, logits_RV.stride(0)), BLOCK=_BLOCK
    )
    score_R, block_R = best.max(1)
    return token.gather(1, block_R[:, None])[:, 0].long(), score_R


@triton.jit
def _mixed(z):  # type: ignore[no-untyped-def]
    z = (z ^ (z >> 16)) * 0x7FEB352D
    z = (z ^ (z >> 15)) * 0x846CA68B
    return z ^ (z >> 16)


@triton.jit
def _best_of_block(  # type: ignore[no-untyped-def]
    logits, low, high, temperature, best, token, vocabulary, stride, BLOCK: tl.constexpr
):
    row, block = tl.program_id(0), tl.program_id(1)
    v = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * stride + v, mask=v < vocabulary, other=-float("inf"))
    low_word = tl.load(low + row).to(tl.uint32, bitcast=True)
    high_word = tl.load(high + row).to(tl.uint32, bitcast=True)
    inner = _mixed(v.to(tl.uint32) * 0x9E3779B9 + low_word)
    first = _mixed(inner + high_word)
    second = _mixed(inner + (high_word ^ 0x5BD1E995)) >> 12
    u = first.to(tl.float64) * 2.3283064365386963e-10  # 2^-32
    u += second.to(tl.float64) * 2.220446049250313e-16  # 2^-52
    u += 1.1102230246251565e-16  # 2^-53
    score = x.to(tl.float32).to(tl.float64) / tl.load(temperature) - tl.log(-tl.log(u))
    largest = tl.max(score, 0)
    any_nan = tl.max((x != x).to(tl.int32), 0)
    place = row * tl.num_programs(1) + block
    tl.store(best + place, tl.where(any_nan > 0, float("nan"), largest))
    tl.store(token + place, block * BLOCK + tl.argmax(score, 0))
